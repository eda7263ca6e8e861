"""runtime/backends/huge_pages.py on this process's own memory."""

import ctypes
import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from tiny_align.runtime.backends import huge_pages
from tiny_align.runtime.backends.huge_pages import COLLAPSE, MIN_BYTES, PAGE, on_huge_pages, without


def kernel_collapses() -> bool:
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(bytes(4 * PAGE))
    start = -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // PAGE) * PAGE
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(PAGE), COLLAPSE) == 0


def on_huge() -> int:
    """Bytes of this process that lie on huge pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\s*(\d+)", rollup)[1]) * 1024


def join_collapsing_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "huge pages":
            thread.join()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_memory_that_is_allocated_in_the_block_moves_to_huge_pages():
    if not kernel_collapses():
        pytest.skip("this kernel does not collapse memory on request")
    join_collapsing_threads()
    before = on_huge()
    with on_huge_pages():
        array = np.arange(2 * MIN_BYTES // 8)
    join_collapsing_threads()
    assert on_huge() - before >= MIN_BYTES and array[-1] == len(array) - 1


def test_memory_that_was_there_before_is_left_out():
    assert without([(0, 10), (20, 40)], [(0, 10), (25, 30)]) == [(20, 25), (30, 40)]
    assert without([(5, 9)], [(0, 100)]) == []
    assert without([(5, 9)], []) == [(5, 9)]


def test_small_memory_is_left_alone(monkeypatch):
    collapsed = []
    monkeypatch.setattr(huge_pages, "_collapse", collapsed.append)
    with on_huge_pages():
        array = np.ones(MIN_BYTES // 32)
    assert collapsed == [] and len(array)


def test_a_system_without_maps_is_left_alone(monkeypatch):
    monkeypatch.setattr(huge_pages, "MAPS", Path("/nowhere/maps"))
    with on_huge_pages():
        array = np.ones(MIN_BYTES // 4)
    assert len(array)
