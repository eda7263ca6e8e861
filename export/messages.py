"""What libraries print while they export: it goes to a log file, ours goes to the screen.

They write by warnings, by logging and straight to file descriptors 1 and 2, from Python and C++.
"""

import contextlib
import ctypes
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

OURS = "tiny_align"  # the logger whose messages are for the user


@contextlib.contextmanager
def messages_to_log() -> Iterator[TextIO]:
    """Send what is written to stdout and stderr in this block to a file for temporary files.

    The file is no part of a bundle, whose files are hashed. Its name is printed on stderr at the
    end, also of a block that raises; an empty one is removed. Messages of our own loggers go to
    stderr as before.

    Yields:
        Stderr, as it is outside of the block.
    """
    descriptor, name = tempfile.mkstemp(prefix="tiny-align-export-", suffix=".log")
    log = Path(name)
    with (
        io.TextIOWrapper(_LogFile(descriptor, "w"), "utf-8", "backslashreplace") as file,
        _own_stderr() as screen,
    ):
        try:
            with _everything_to(file), _own_messages_to(screen):
                yield screen
        finally:
            file.flush()
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
                if log.stat().st_size:
                    print(f"messages of libraries: {log}", file=screen, flush=True)
                else:
                    log.unlink()


class _LogFile(io.FileIO):
    """A file in which a full disk loses messages, and fails nothing else."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


@contextlib.contextmanager
def _own_stderr() -> Iterator[TextIO]:
    """A stream to what is stderr now, whatever happens to its file descriptor."""
    try:
        descriptor = sys.stderr.fileno()
    except (io.UnsupportedOperation, ValueError):  # it is in memory, as in a test
        yield sys.stderr
        return
    with open(os.dup(descriptor), "w", encoding=sys.stderr.encoding, errors="replace") as stream:
        yield stream


@contextlib.contextmanager
def _everything_to(file: TextIO) -> Iterator[None]:
    """Send file descriptors 1 and 2 and Python's streams to a file, then put them back."""
    _flush()
    with contextlib.ExitStack() as stack:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # it is closed
                before = os.dup(descriptor)
                stack.callback(os.close, before)
                stack.callback(os.dup2, before, descriptor)
                os.dup2(file.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        stack.callback(_flush)  # while what libraries have buffered leads to the file
        yield


def _flush() -> None:
    """Write out what Python's and C's own streams have buffered."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    ctypes.CDLL(None).fflush(None)


class _ScreenHandler(logging.Handler):
    """Prints messages above a progress bar."""

    def __init__(self, screen: TextIO):
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"warning: {self.format(record)}", file=self._screen)


@contextlib.contextmanager
def _own_messages_to(screen: TextIO) -> Iterator[None]:
    handler = _ScreenHandler(screen)
    logger = logging.getLogger(OURS)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
