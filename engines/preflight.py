"""What is refused before a build starts: a graph that TensorRT forbids, too little memory.

The rules for a graph are those of runtime/bundle/tensorrt_rules.py.

A board that runs out of memory freezes, or kills processes.

The estimate is above what `python -m benchmarks.studies.engines` measured for TensorRT-RTX's build
processes, also where an engine is held in memory as a whole, as TensorRT 10.3 does. What the
GPU itself takes on a Jetson was not measured.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from tiny_align.engines.builder import Builder
from tiny_align.runtime.bundle.onnx_weights import load_graph
from tiny_align.runtime.bundle.profile import ShapeRange
from tiny_align.runtime.bundle.tensorrt_graph import OLDEST
from tiny_align.runtime.bundle.tensorrt_rules import summary, violations
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import memory, memory_limits

log = logging.getLogger(__name__)

BASE_BYTES = 500_000_000  # of the builder itself
BYTES_PER_GRAPH_BYTE = 3.5  # the graph as read, as optimised, and as an engine


def require_legal(
    graph: str, path: Path, profile: Mapping[str, ShapeRange], builder: Builder
) -> None:
    """Refuse a graph that TensorRT would refuse.

    TensorRT-RTX takes most of what TensorRT refuses: with it, a warning names what the oldest
    supported TensorRT would refuse.

    Args:
        graph: its name in the manifest.
        path: the ONNX file that is built.
        profile: the shapes it is built for.

    Raises:
        BackendError: with the first node that breaks each rule, if TensorRT builds.
    """
    is_tensorrt = builder.package == "tensorrt"
    version = builder.version if is_tensorrt else OLDEST
    found = violations(load_graph(path), path.parent, profile, version)
    if not found:
        return
    if not is_tensorrt:
        log.warning("TensorRT would refuse the graph %r: %s", graph, summary(found))
        return
    raise BackendError(
        f"TensorRT {builder.version} refuses the graph {graph!r}: {summary(found)}: "
        "export the bundle again; --force builds anyway"
    )


def build_need_bytes(graph_bytes: int) -> int:
    """Memory that a build takes.

    Args:
        graph_bytes: size of the graph, its weights in other files included.
    """
    return BASE_BYTES + round(BYTES_PER_GRAPH_BYTE * graph_bytes)


def require_memory(graph: str, graph_bytes: int, *, swaps: bool) -> None:
    """Refuse a build for which there is too little memory.

    Args:
        swaps: whether the build's memory can go to swap: not if a GPU shares it.

    Raises:
        BackendError: with the memory that is needed, what there is, and what to do.
    """
    available = memory()
    need = build_need_bytes(graph_bytes)
    if "MemAvailable" not in available:
        return
    usable = available["MemAvailable"]
    if swaps:
        usable += available.get("SwapFree", 0)
    limits = [room for room in memory_limits() if room.free < min(need, usable)]
    if usable >= need and not limits:
        return
    found = []
    for name, size in available.items():
        if name != "MemTotal":
            found.append(f"{name} {size >> 20} MiB")
    for room in limits:
        found.append(f"{room.free >> 20} MiB {room.limit}")
    remedies = [
        "close other programs (a desktop takes much)",
        "restart the machine and build first",
    ]
    if swaps:
        remedies.append("add swap")
    if "CmaFree" in available:
        remedies.append("give the GPU more contiguous memory (cma=950M in the kernel's arguments)")
    raise BackendError(
        f"building the graph {graph!r} takes about {need >> 20} MiB of memory, and there is less "
        f"({', '.join(found)}): {' or '.join(remedies)}; --force builds anyway"
    )
