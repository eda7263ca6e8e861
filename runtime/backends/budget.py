"""What a loaded bundle takes of memory, computed from its files before anything is loaded.

That is weights, the beginning of one KV cache, and the memory that graphs work in. The last is an
estimate: a little more than `python -m benchmarks.studies.full_size` measured. A KV cache doubles
when it is full, up to the context, and each step is held against the free memory by itself.
"""

import math
import os
from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.backends import registry
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.machine import Room, memory, memory_limits

BASE_BYTES = 120_000_000  # the interpreter, numpy and a backend
WORK_SHARE = 0.6  # of the weights: what graphs work in, and weights that the backend reorders
SESSION_THREADS = 2  # that encode and prefill, see session.py
FIRST_POSITIONS = 256  # for which a KV cache is laid out at first


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for."""

    weights: dict[str, int]  # graph -> its weights, and what it works in
    cache: int  # keys and values at the beginning of a conversation
    context: int  # positions of a conversation at most
    position: int  # keys and values of one
    speech: int  # the speech vocabulary's embeddings
    threads: int  # that are started, of all graphs and a conversation

    @property
    def total(self) -> int:
        """Bytes with one conversation."""
        return BASE_BYTES + sum(self.weights.values()) + self.cache + self.speech

    def __str__(self) -> str:
        parts = [f"{name} {size >> 20} MiB" for name, size in self.weights.items()]
        full = self.context * self.position
        parts.append(
            f"a conversation {self.cache >> 20} MiB, {full >> 20} MiB with all of its "
            f"{self.context} positions of {self.position} bytes"
        )
        return f"{self.total >> 20} MiB ({', '.join(parts)})"

    def require(self) -> None:
        """
        Raises:
            TinyAlignError: less memory is free than that.
        """
        short = _short_of(self.total, self.threads)
        if short is None:
            return
        need = f"the bundle takes about {self}"
        remedy = "or close other programs"
        if short.thread_bytes:
            need += f" with what {self.threads} threads reserve"
            remedy = "raise that limit, or give fewer --threads"
        raise TinyAlignError(
            f"{need}, and {short.limit} {short.free >> 20} MiB are available: ask for a smaller "
            "context, export with fewer bits (--precision int4, --encoder-precision int8), "
            f"{remedy}"
        )


def _short_of(need: int, threads: int = 0) -> Room | None:
    """The tightest of the limits on memory, if it is too tight."""
    rooms = memory_limits()
    free = memory().get("MemAvailable")
    if free is not None:
        rooms = [Room(free, "on this machine"), *rooms]
    short = [room for room in rooms if room.free < need + threads * room.thread_bytes]
    return min(short, key=lambda room: room.free, default=None)


def budget(bundle: Bundle, backend: str, context: int, threads: int | None = None) -> Budget:
    """What `bundle` takes on a backend with conversations of `context` positions.

    Args:
        threads: CPU threads per graph; None: all cores.

    Raises:
        BackendError: there is no such backend.
        BundleError: a bundle without an LLM.
    """
    bundle.graph("llm")  # refuses a bundle without one
    weights = {}
    for name, graph in registry.graph_specs(bundle, backend).items():
        size = _weight_bytes(bundle, graph, bundle.manifest.graphs[name])
        weights[name] = round(size * (1 + WORK_SHARE))
    speech = len(bundle.speech_tokens()) * bundle.manifest.llm.hidden_size * 4
    helpers = len(weights) * ((threads or os.cpu_count() or 1) - 1)  # beside the calling thread
    return Budget(
        weights,
        cache_bytes(bundle, backend, cache_positions(0, context)),
        context,
        cache_bytes(bundle, backend, 1),
        speech,
        helpers + SESSION_THREADS,
    )


def cache_bytes(bundle: Bundle, backend: str, context: int) -> int:
    """Keys and values of `context` positions: inputs of the LLM's graph that have four dimensions.

    A decoder that is no registered backend's keeps one set of them.
    """
    one_set = context * position_bytes(bundle.manifest.graphs["llm"].on(backend))
    if backend not in registry.names():
        return one_set
    return registry.find_backend(backend).cache_sets * one_set


def position_bytes(llm: GraphSpec) -> int:
    """Keys and values of one position, in one set of them."""
    n_bytes = 0
    for tensor in llm.inputs:
        if len(tensor.shape) == 4:
            fixed = [size for size in tensor.shape if isinstance(size, int)]
            n_bytes += math.prod(fixed) * np.dtype(tensor.dtype).itemsize
    return n_bytes


def cache_positions(n_needed: int, context: int) -> int:
    """Positions for which a cache is laid out that needs `n_needed`, at most `context`."""
    positions = FIRST_POSITIONS
    while positions < n_needed:
        positions *= 2
    return min(positions, context)


def require_cache(bundle: Bundle, backend: str, positions: int, before: int = 0) -> None:
    """
    Args:
        before: positions for which the cache is laid out; 0: it is a new conversation's.
    Raises:
        TinyAlignError: less memory is free than a cache of so many positions takes.
    """
    need = cache_bytes(bundle, backend, positions - before)
    short = _short_of(need)
    if short:
        what = "a longer conversation" if before else "one more conversation"
        raise TinyAlignError(
            f"{what} of {positions} positions takes {need >> 20} MiB, and "
            f"{short.limit} {short.free >> 20} MiB are available: end another one, or load the "
            "bundle with a smaller context"
        )


def _weight_bytes(bundle: Bundle, graph: GraphSpec, plain: GraphSpec) -> int:
    """A graph's file and weights.

    A backend's own graph shares weights with the plain one, and has some that the plain one has in
    another form: it has about as many as the plain one, or its own if they are more.
    """
    sizes = {}
    for name in (graph.file, f"{graph.file}.data", f"{plain.file}.data"):
        listed = name in bundle.manifest.files
        sizes[name] = (bundle.path / name).stat().st_size if listed else 0
    return sizes[graph.file] + max(sizes[f"{graph.file}.data"], sizes[f"{plain.file}.data"])
