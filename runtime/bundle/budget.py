"""What a loaded bundle takes of memory, known from its manifest and files before anything is loaded.

Everything is laid out at the start: weights, one KV cache per conversation for its whole context, and the room that
graphs work in. That room is an estimate: `python -m benchmarks.studies.full_size` measured a little less.
"""

import math
import os
from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.machine import Room, memory, memory_limits

BASE_BYTES = 120_000_000  # the interpreter, numpy and a backend
WORK_SHARE = 0.6  # of the weights: what graphs work in, and what the backend keeps of weights in another order
SESSION_THREADS = 2  # that hear and read, see session.py
CACHE_SETS = {"onnxruntime": 1, "tensorrt": 2}  # of keys and values, see the backends


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for."""

    weights: dict[str, int]  # graph -> its weights, and what it works in
    cache: int  # keys and values of one conversation
    context: int  # positions of it
    speech: int  # the speech vocabulary's embeddings
    threads: int  # that are started, of all graphs and a conversation

    @property
    def total(self) -> int:
        """With one conversation."""
        return BASE_BYTES + sum(self.weights.values()) + self.cache + self.speech

    def __str__(self) -> str:
        parts = [f"{name} {size >> 20} MiB" for name, size in self.weights.items()]
        parts.append(f"a conversation of {self.context} positions {self.cache >> 20} MiB")
        return f"{self.total >> 20} MiB ({', '.join(parts)})"

    def require(self) -> None:
        """
        Raises:
            TinyAlignError: less memory is free than that.
        """
        if short := _short_of(self.total, self.threads):
            threads = f" with what {self.threads} threads reserve" if short.thread_bytes else ""
            raise TinyAlignError(
                f"the bundle takes about {self}{threads}, and {short.limit} {short.free >> 20} MiB are available: "
                "ask for a smaller context, export with fewer bits (--precision int4, --encoder-precision int8), "
                + (
                    "raise that limit, or give fewer --threads"
                    if short.thread_bytes
                    else "or close other programs"
                )
            )


def _short_of(need: int, threads: int = 0) -> Room | None:
    """The tightest of the limits on memory, if it is too tight."""
    free = memory().get("MemAvailable")
    rooms = [*([] if free is None else [Room(free, "on this machine")]), *memory_limits()]
    short = [room for room in rooms if room.free < need + threads * room.thread_bytes]
    return min(short, key=lambda room: room.free, default=None)


def budget(bundle: Bundle, backend: str, context: int, threads: int | None = None) -> Budget:
    """What `bundle` takes on a backend with conversations of `context` positions.

    Args:
        threads: CPU threads per graph; None: all cores.
    """
    bundle.graph("llm")  # refuses a bundle without one
    sizes = {
        name: _weight_bytes(bundle, graph, backend)
        for name, graph in bundle.manifest.graphs.items()
    }
    speech = len(bundle.speech_tokens()) * bundle.manifest.llm.hidden_size * 4
    cache = cache_bytes(bundle.manifest.graphs["llm"], backend, context)
    weights = {n: round(size * (1 + WORK_SHARE)) for n, size in sizes.items()}
    helpers = len(sizes) * ((threads or os.cpu_count() or 1) - 1)  # beside the one that asks
    return Budget(weights, cache, context, speech, helpers + SESSION_THREADS)


def cache_bytes(graph: GraphSpec, backend: str, context: int) -> int:
    """Keys and values of one conversation: the inputs of the LLM's graph that have four dimensions."""
    kept = [tensor for tensor in graph.on(backend).inputs if len(tensor.shape) == 4]
    shapes = [[context if isinstance(dim, str) else dim for dim in tensor.shape] for tensor in kept]
    one = sum(
        math.prod(shape) * np.dtype(tensor.dtype).itemsize for tensor, shape in zip(kept, shapes)
    )
    return CACHE_SETS.get(backend, 1) * one


def require_cache(bundle: Bundle, backend: str, context: int) -> None:
    """
    Raises:
        TinyAlignError: less memory is free than one more conversation takes.
    """
    need = cache_bytes(bundle.manifest.graphs["llm"], backend, context)
    if short := _short_of(need):
        raise TinyAlignError(
            f"one more conversation of {context} positions takes {need >> 20} MiB, and {short.limit} "
            f"{short.free >> 20} MiB are available: end another one, or load the bundle with a smaller context"
        )


def _weight_bytes(bundle: Bundle, graph: GraphSpec, backend: str) -> int:
    """A graph's files; a backend's own graph may share its weights with the plain one."""
    own, plain = graph.on(backend).file, graph.file
    shared = [f"{own}.data"] if f"{own}.data" in bundle.manifest.files else [f"{plain}.data"]
    return sum(
        (bundle.path / name).stat().st_size
        for name in (own, *shared)
        if name in bundle.manifest.files
    )
