"""What a loaded bundle takes of memory, known from its manifest and files before anything is loaded.

Everything is laid out at the start: weights, one KV cache per conversation for its whole context, and the room that
graphs work in. That room is an estimate: `python -m benchmarks.full_size` measured a little less.
"""

from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.bundle import Bundle, GraphSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.machine import memory

BASE_BYTES = 120_000_000  # the interpreter, numpy and a backend
WORK_SHARE = 0.6  # of the weights: what graphs work in, and what the backend keeps of weights in another order
CACHE_SETS = {"onnxruntime": 1, "tensorrt": 2}  # of keys and values, see the backends


@dataclass(frozen=True)
class Budget:
    """Bytes, by what they are for."""

    weights: dict[str, int]  # graph -> its weights, and what it works in
    cache: int  # keys and values of one conversation
    context: int  # positions of it
    speech: int  # the speech vocabulary's embeddings

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
        free = memory().get("MemAvailable")
        if free is not None and free < self.total:
            raise TinyAlignError(
                f"the bundle takes about {self}, and {free >> 20} MiB are available: ask for a smaller context, export "
                "with fewer bits (--precision int4, --encoder-precision int8), or close other programs"
            )


def budget(bundle: Bundle, backend: str, context: int) -> Budget:
    """What `bundle` takes on a backend with conversations of `context` positions."""
    sizes = {name: _weight_bytes(bundle, graph, backend) for name, graph in bundle.manifest.graphs.items()}
    speech = len(bundle.speech_tokens()) * bundle.manifest.llm.hidden_size * 4
    cache = cache_bytes(bundle.manifest.graphs["llm"], backend, context)
    return Budget({n: round(size * (1 + WORK_SHARE)) for n, size in sizes.items()}, cache, context, speech)


def cache_bytes(graph: GraphSpec, backend: str, context: int) -> int:
    """Keys and values of one conversation: the inputs of the LLM's graph that have four dimensions."""
    kept = [tensor for tensor in graph.on(backend).inputs if len(tensor.shape) == 4]
    shapes = [[context if isinstance(dim, str) else dim for dim in tensor.shape] for tensor in kept]
    one = sum(int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize for tensor, shape in zip(kept, shapes))
    return CACHE_SETS.get(backend, 1) * one


def require_cache(bundle: Bundle, backend: str, context: int) -> None:
    """
    Raises:
        TinyAlignError: less memory is free than one more conversation takes.
    """
    need, free = cache_bytes(bundle.manifest.graphs["llm"], backend, context), memory().get("MemAvailable")
    if free is not None and free < need:
        raise TinyAlignError(
            f"one more conversation of {context} positions takes {need >> 20} MiB, and {free >> 20} MiB are available: "
            "end another one, or load the bundle with a smaller context"
        )


def _weight_bytes(bundle: Bundle, graph: GraphSpec, backend: str) -> int:
    """A graph's files; a backend's own graph may share its weights with the plain one."""
    own, plain = graph.on(backend).file, graph.file
    shared = [f"{own}.data"] if f"{own}.data" in bundle.manifest.files else [f"{plain}.data"]
    return sum((bundle.path / name).stat().st_size for name in (own, *shared) if name in bundle.manifest.files)
