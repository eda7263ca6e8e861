"""Files written whole or not at all, and their hashes."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import tokenize
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    import numpy as np

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's <fcntl.h> and <stdio.h>

NO_ARRAY = (  # what numpy.load raises of a file that is damaged, or none of its own
    ValueError,
    EOFError,
    SyntaxError,
    OverflowError,
    MemoryError,  # a header that claims more than there is room for
    tokenize.TokenError,
    zipfile.BadZipFile,
)


def read_array(
    path: Path, kind: type[TinyAlignError] = TinyAlignError, mmap_mode: Literal["r"] | None = None
) -> "np.ndarray":
    """The array of a .npy file; with `mmap_mode` "r" it is mapped, not read.

    Raises:
        kind: the file cannot be read, is damaged or holds several arrays.
    """
    import numpy as np

    try:
        with read_errors(path, kind):
            array = np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    except NO_ARRAY as error:
        raise kind(f"{path} is damaged ({error}): copy, export or train it again") from error
    if not isinstance(array, np.ndarray):  # an archive
        raise kind(f"{path} is damaged (no single array): copy, export or train it again")
    return array


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def read_errors(source: Path, kind: type[TinyAlignError] = TinyAlignError):
    """Turns the system's refusal to read into one sentence: about the file that it names, or else about `source`."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{error.filename or source} cannot be read ({error.strerror or error}): check the path, and that you may "
            "read it"
        ) from error


@contextlib.contextmanager
def write_errors(target: Path):
    """Turns the system's refusal to write (a full disk, no permission) into one sentence about `target`."""
    try:
        yield
    except BrokenPipeError:  # of somebody who reads what we say
        raise
    except OSError as error:  # numpy gives its own for a full disk, without a number
        raise TinyAlignError(
            f"{target} cannot be written ({error.strerror or error}): make room, or give a folder you may write to"
        ) from error


@contextlib.contextmanager
def written_file(target: Path):
    """Yields a temporary path beside `target`; on success it becomes `target`. What a killed process left is replaced.

    Raises:
        TinyAlignError: the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with write_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def written_folder(target: Path):
    """Yields a temporary folder beside `target`; on success it becomes `target`, replacing an old one."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, in one step where the system can exchange two folders.

    Elsewhere an old `target` is renamed first, and put back if the second step fails.
    """
    old = new.with_name(new.name + "-old")
    if target.exists() and _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)  # what was `target`
        return
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name at once; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, glibc 2.28
    return (
        rename is not None
        and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0
    )


def link_tree(source: Path, target: Path) -> None:
    """The files of `source` in the folder `target` as well, without copies where the file system has hard links.

    A linked file must be replaced, never written into.
    """
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=link_file)


def link_file(source, target) -> None:
    """The file under a second name, or a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
