"""Huge pages for an LLM's weights: a step of decoding reads them all, page after page.

Linux collapses memory into huge pages on request since 6.1 (madvise(2), MADV_COLLAPSE). That
takes seconds for a gigabyte, so a thread does it beside whatever comes next. Without such a
kernel, or if it refuses, nothing changes.
"""

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COLLAPSE = 25  # MADV_COLLAPSE
PAGE = 2 << 20  # bytes of a huge page on x86-64 and, with 4 KiB pages, on ARM
MIN_BYTES = 16 * PAGE  # of a mapping worth it
MAPS = Path("/proc/self/maps")
ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0\s*(?:\[heap\])?$", re.MULTILINE)

Mapping = tuple[int, int]  # start and end address


@contextlib.contextmanager
def on_huge_pages() -> Iterator[None]:
    """Move large memory that is allocated in this block to huge pages, soon after it."""
    before = _mappings()
    yield
    large = []
    for start, end in without(_mappings(), before):
        first_page = -(-start // PAGE) * PAGE
        last_page = end // PAGE * PAGE
        if last_page - first_page >= MIN_BYTES:
            large.append((first_page, last_page))
    if large:
        thread = threading.Thread(target=_collapse, args=(large,), name="huge pages", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: leave it as it is
            thread.start()


def _mappings() -> list[Mapping]:
    """This process's private anonymous memory."""
    if not MAPS.exists():
        return []
    return [(int(start, 16), int(end, 16)) for start, end in ANONYMOUS.findall(MAPS.read_text())]


def without(mappings: list[Mapping], others: list[Mapping]) -> list[Mapping]:
    """What of `mappings` is in none of `others`: a mapping grows at either end."""
    for start, end in others:
        rest = []
        for first, last in mappings:
            rest += [(first, min(last, start)), (max(first, end), last)]
        mappings = [(first, last) for first, last in rest if first < last]
    return mappings


def _collapse(mappings: list[Mapping]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in mappings:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), COLLAPSE)
