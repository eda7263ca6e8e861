"""Whether a build will fit into memory, asked before it starts: a board that runs out of it freezes or kills.

The need is an estimate above what `python -m benchmarks.studies.engines` measured of TensorRT-RTX's build processes, and of the
same ones where an engine is held whole, as by TensorRT 10.3. What the GPU's own work takes on a Jetson nobody measured.
"""

from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import memory, memory_limits

BASE_BYTES = 500_000_000  # of the builder itself
BYTES_PER_GRAPH_BYTE = 3.5  # the graph as read, as optimised, and as an engine


def build_need_bytes(graph_bytes: int) -> int:
    """Memory that the build of a graph takes, weights in other files included in its bytes."""
    return BASE_BYTES + round(BYTES_PER_GRAPH_BYTE * graph_bytes)


def require_memory(graph: str, graph_bytes: int, *, swaps: bool) -> None:
    """Refuse a build that memory will not do for.

    Args:
        swaps: whether what the build holds can go to swap: not where a GPU shares the memory.

    Raises:
        BackendError: with the need, what there is, and what to do.
    """
    have, need = memory(), build_need_bytes(graph_bytes)
    if "MemAvailable" not in have:
        return
    usable = have["MemAvailable"] + (have.get("SwapFree", 0) if swaps else 0)
    limits = [room for room in memory_limits() if room.free < min(need, usable)]
    if usable < need or limits:
        told = ", ".join(
            f"{name} {size >> 20} MiB" for name, size in have.items() if name != "MemTotal"
        )
        told += "".join(f", {room.free >> 20} MiB {room.limit}" for room in limits)
        raise BackendError(
            f"building the graph {graph!r} takes about {need >> 20} MiB of memory, and there is less ({told}): "
            f"{_remedy(swaps, have)}; --force builds all the same"
        )


def _remedy(swaps: bool, have: dict[str, int]) -> str:
    ways = ["close other programs (a desktop takes much)", "restart the machine and build first"]
    if swaps:
        ways.append("add swap")
    if "CmaFree" in have:
        ways.append("give the GPU more contiguous memory (cma=950M in the kernel's arguments)")
    return " or ".join(ways)
