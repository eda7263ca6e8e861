"""One process at a time trains somebody's projector, or a bundle's: a lock in the work folder.

It is the system's (filelock), so that it ends with the process, however that ends.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tiny_align.runtime.files import write_errors

LOCK = "lock"


def work_folder(folder: Path) -> Path:
    """Where a training keeps what it may go on from: hidden, beside the person's folder or the bundle."""
    return folder.with_name(f".{folder.name}.align")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Yields the work folder of a person's folder, or a bundle's, with no other process in here meanwhile.

    Another one that is there is waited for, which is said. The same process may enter twice. The lock's file and the
    folders that were made for it go at the end, where nothing else has come into them.

    Raises:
        TinyAlignError: the work folder cannot be written.
    """
    from filelock import FileLock

    work = work_folder(folder)
    made = [path for path in (work, *work.parents) if not path.exists()]
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, is_singleton=True)
        _wait(
            lock,
            work,
            f"tiny-align: another process is training {folder.name}: waiting until it has finished",
        )
    try:
        yield work
    finally:
        if lock.lock_counter == 1:
            _tidy(work, made)
        lock.release()


def _wait(lock, work: Path, sentence: str) -> None:
    """Take the lock; where another process has it, say so, once."""
    from filelock import Timeout

    timeout_s = 0.0
    while True:
        try:
            lock.acquire(timeout=timeout_s)
            return
        except Timeout:
            if not timeout_s:
                print(sentence, file=sys.stderr, flush=True)
            timeout_s = 60.0
        except FileNotFoundError:  # the other one has just removed the folder
            work.mkdir(parents=True, exist_ok=True)


def _tidy(work: Path, made: list[Path]) -> None:
    """Remove the lock's file, while it is ours: whoever waits looks whether it is still there. Then what is empty."""
    with contextlib.suppress(OSError):
        (work / LOCK).unlink()
        for path in dict.fromkeys([work, *made]):
            path.rmdir()  # refused unless empty
