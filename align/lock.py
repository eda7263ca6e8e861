"""A lock in the work folder: only one process at a time trains a user's projector, or a bundle's.

It is the operating system's lock (filelock), which ends with the process, however the process ends.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_align.runtime.files import write_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = "lock"


def work_folder(folder: Path) -> Path:
    """The hidden folder beside a user's folder, or a bundle.

    It holds the lock, the features and the state that a training resumes from.
    """
    return folder.with_name(f".{folder.name}.align")


@contextlib.contextmanager
def training_lock(folder: Path) -> Iterator[Path]:
    """Hold the lock of a user's folder, or a bundle's; yields its work folder.

    If another process holds it, say so and wait. The same process may take the lock twice. At the
    end the lock file is removed, and so are the folders made for it if they are empty.

    Raises:
        TinyAlignError: the work folder cannot be written.
    """
    from filelock import FileLock

    work = work_folder(folder)
    made = [path for path in (work, *work.parents) if not path.exists()]
    with write_errors(work):
        _make_folder(work)
        lock = FileLock(work / LOCK, is_singleton=True)
        _acquire(lock, work, folder.name)
    try:
        yield work
    finally:
        if lock.lock_counter == 1:
            _tidy(work, made)
        lock.release()


def _acquire(lock: "BaseFileLock", work: Path, name: str) -> None:
    """Take the lock; if another process holds it, say so once and wait."""
    from filelock import Timeout

    timeout_s = 0.0
    while True:
        try:
            lock.acquire(timeout=timeout_s)
            return
        except Timeout:
            if timeout_s == 0:
                waiting = f"another process is training {name}: waiting until it has finished"
                print(f"tiny-align: {waiting}", file=sys.stderr, flush=True)
            timeout_s = 60.0
        except FileNotFoundError:  # the other process has just removed the folder
            _make_folder(work)


def _make_folder(work: Path) -> None:
    """Make the work folder, though another process may remove it at any time."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            return
        except FileExistsError:
            if work.exists():
                raise  # a file


def _tidy(work: Path, made: list[Path]) -> None:
    """Remove the lock file while it is ours, then the folders that are empty.

    A process that waits for the lock notices that the file is gone and makes it again.
    """
    with contextlib.suppress(OSError):
        (work / LOCK).unlink()
        for path in dict.fromkeys([work, *made]):
            path.rmdir()  # refused unless empty
