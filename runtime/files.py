"""Write files and folders whole or not at all, and hash them."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    import numpy as np

AT_FDCWD = -100  # Linux's <fcntl.h>
RENAME_EXCHANGE = 2  # Linux's <stdio.h>

ARRAY_ERRORS = (  # numpy.load raises them for a file that is damaged, or not one of its own
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
    except ARRAY_ERRORS as error:
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
def read_errors(source: Path, kind: type[TinyAlignError] = TinyAlignError) -> Iterator[None]:
    """Turn an OSError of reading into `kind`, in one sentence about its file, or else `source`."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{error.filename or source} cannot be read ({error.strerror or error}): "
            "check the path, and that you may read it"
        ) from error


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of writing (a full disk, no permission) into one sentence about `target`."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output is gone
        raise
    except OSError as error:  # numpy raises its own for a full disk, without a number
        raise TinyAlignError(
            f"{target} cannot be written ({error.strerror or error}): "
            "make room, or give a folder you may write to"
        ) from error


@contextlib.contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it becomes `target`.

    What a killed process left behind is replaced.

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
def written_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it replaces `target`."""
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

    On other systems an old `target` is renamed first, and put back if the second step fails.
    """
    old = new.with_name(new.name + "-old")
    if target.exists() and _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)  # the old `target`
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
    """Give two folders each other's name at once; False if the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, glibc 2.28
    if rename is None:
        return False
    paths = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other))
    return rename(*paths, RENAME_EXCHANGE) == 0


def link_tree(source: Path, target: Path) -> None:
    """Put the files of `source` into the folder `target` as well, as hard links if possible.

    A linked file must be replaced, never written into.
    """
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=link_file)


def link_file(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
