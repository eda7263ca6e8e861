"""Huge pages for an LLM's weights: a step of decoding reads them all, page after page.

Linux collapses memory into them on request since 6.1 (madvise(2), MADV_COLLAPSE). That takes seconds for a gigabyte, so
it is done beside whatever comes next. Elsewhere, and where the kernel refuses, nothing changes.
"""

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COLLAPSE, PAGE = (
    25,
    2 << 20,
)  # MADV_COLLAPSE; bytes of a huge page on x86-64 and, with 4 KiB pages, on ARM
LEAST = 16 * PAGE  # bytes of a mapping worth it
MAPS = Path("/proc/self/maps")
ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0\s*(?:\[heap\])?$", re.MULTILINE)


@contextlib.contextmanager
def on_huge_pages() -> Iterator[None]:
    """What is allocated in this block, and is large, lies on huge pages soon after it, where the system has them."""
    before = _mappings()
    yield
    new = _without(_mappings(), before)
    if large := [m for m in map(_whole_pages, new) if m[1] - m[0] >= LEAST]:
        with contextlib.suppress(RuntimeError):  # no more threads: it can do without
            threading.Thread(
                target=_collapse, args=(large,), name="huge pages", daemon=True
            ).start()


def _mappings() -> list[tuple[int, int]]:
    """Start and end of this process's private anonymous memory."""
    if not MAPS.exists():
        return []
    return [(int(start, 16), int(end, 16)) for start, end in ANONYMOUS.findall(MAPS.read_text())]


def _without(
    mappings: list[tuple[int, int]], others: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What of `mappings` is in none of `others`: a mapping grows at either end."""
    for start, end in others:
        pieces = (piece for a, b in mappings for piece in ((a, min(b, start)), (max(a, end), b)))
        mappings = [(a, b) for a, b in pieces if a < b]
    return mappings


def _whole_pages(mapping: tuple[int, int]) -> tuple[int, int]:
    return -(-mapping[0] // PAGE) * PAGE, mapping[1] // PAGE * PAGE


def _collapse(mappings: list[tuple[int, int]]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in mappings:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), COLLAPSE)
