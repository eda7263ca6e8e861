"""What every backend fulfils: `Runner`, a graph on named arrays, and `Decoder`, an LLM with its cache.

`Runner.__call__` checks names, types and sizes once, here; a backend implements `_run`. A `Chain` is two of them, and a
backend may leave what is between them where it is. A decoder's cache is memory of the backend's own, laid out once for
the whole context: nothing of it is copied through numpy. What a decoder gives is `Scores`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.errors import BackendError

BACKENDS = ("onnxruntime", "tensorrt")
TOPK_LOGITS, TOPK_TOKENS = (
    "best_logits",
    "best_tokens",
)  # outputs of an LLM's graph that picks the best few itself


class Loaded:
    """What a backend has loaded; a context manager."""

    name = ""  # the backend's, as --backend takes it

    def close(self) -> None:
        """Free what the graph holds."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Runner(Loaded, ABC):
    """One loaded graph."""

    def __init__(self, spec: GraphSpec):
        self.spec = spec

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph: input name -> array to output name -> array.

        Raises:
            BackendError: a missing or unknown input, a wrong dtype or a wrong size.
        """
        self._check(feed)
        return self._run(feed)

    def _check(self, feed: dict) -> None:
        expected = [t.name for t in self.spec.inputs]
        if sorted(feed) != sorted(expected):
            raise BackendError(
                f"{self.spec.file} takes the inputs {expected}, given were {sorted(feed)}"
            )
        for tensor in self.spec.inputs:
            value = feed[tensor.name]
            if not _fits(value, tensor):
                raise BackendError(
                    f"{self.spec.file}: input {tensor.name} must be {tensor.dtype} {list(tensor.shape)}, "
                    f"given was {value.dtype} {list(value.shape)}"
                )

    @abstractmethod
    def _run(self, feed: dict) -> dict: ...

    def into(
        self, other: "Runner", feed: dict[str, np.ndarray], rows: int | None = None
    ) -> dict[str, np.ndarray]:
        """See Chain; a backend may do it without numpy between the two."""
        return other({name: value[:, :rows] for name, value in self(feed).items()})


@dataclass(frozen=True)
class Chain:
    """Two graphs, one after the other: the second takes what the first gives. It owns neither of them.

    Raises:
        BackendError: the second takes something else.
    """

    first: Runner
    second: Runner

    def __post_init__(self):
        given, taken = self.first.spec.outputs, self.second.spec.inputs
        if [(t.name, t.dtype) for t in given] != [(t.name, t.dtype) for t in taken]:
            takes, gives = (
                ", ".join(f"{t.name} {t.dtype}" for t in side) for side in (taken, given)
            )
            raise BackendError(
                f"{self.second.spec.file} takes {takes}, {self.first.spec.file} gives {gives}: export the bundle again"
            )

    def __call__(
        self, feed: dict[str, np.ndarray], rows: int | None = None
    ) -> dict[str, np.ndarray]:
        """Run both: the first one's inputs to the second one's outputs.

        Args:
            rows: the second gets so many rows of the first one's (1, N, Da), from the start; None: all of them.
        """
        return self.first.into(self.second, feed, rows)


@dataclass(frozen=True)
class Scores:
    """What a token is chosen by: the logits of every token, or those of the few best and which they are."""

    logits: np.ndarray  # (V,) float32; or (K,), best first
    tokens: np.ndarray | None = None  # (K,) whose they are; None: every token's, in order

    def topk(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The `n` best tokens, best first, and their logits; of fewer tokens all of them.

        Raises:
            BackendError: the graph gives fewer than that.
        """
        if self.tokens is None:
            best = _best(self.logits, n)
            return best, self.logits[best]
        if n > len(self.tokens):
            raise BackendError(
                f"the {n} best tokens were asked for, the LLM's graph gives {len(self.tokens)}: ask for a top_k of at "
                f"most {len(self.tokens)}"
            )
        return self.tokens[:n], self.logits[:n]


def _best(logits: np.ndarray, n: int) -> np.ndarray:
    """Which `n` of (V,) are the greatest, the greatest first; of equals the first."""
    if n == 1:  # greedy, at every token: no partition
        return logits.argmax(keepdims=True)
    some = np.argpartition(logits, -n)[-n:] if n < len(logits) else np.arange(len(logits))
    return some[np.argsort(-logits[some], kind="stable")]


class Decoder(Loaded, ABC):
    """A loaded LLM. It holds no conversation: a cache does, and there may be many."""

    @abstractmethod
    def open_cache(self, capacity: int):
        """Memory for the keys and values of `capacity` positions."""

    @abstractmethod
    def read(self, embeddings: np.ndarray, cache, past: int) -> Scores:
        """Read embeddings (T, D) float32 after the first `past` positions of the cache.

        Returns:
            The last position's, to be used before the next call with this cache.
        """

    @abstractmethod
    def rewind(self, cache, length: int) -> None:
        """Forget all but the first `length` positions of the cache; what is read next follows them."""


def _fits(value: np.ndarray, tensor: TensorSpec) -> bool:
    return value.dtype.name == tensor.dtype and len(value.shape) == len(tensor.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, tensor.shape)
    )  # fmt: skip


def load_runner(
    path: Path,
    spec: GraphSpec,
    backend: str,
    threads: int | None = None,
    bundle: Bundle | None = None,
) -> Runner:
    """Load one graph with the named backend; never another one in its place.

    Args:
        path: the ONNX file; with TensorRT, whose weights the bundle's engine is to have.
        threads: CPU threads, of ONNX Runtime; None: all cores.
        bundle: whose graph it is; TensorRT takes its engines.
    """
    if backend == "onnxruntime":
        from tiny_align.runtime.backends.onnxruntime import OrtRunner

        return OrtRunner(path, spec, threads)
    if backend == "tensorrt":
        from tiny_align.runtime.backends.tensorrt import TrtRunner

        return TrtRunner(path, spec, bundle)
    raise _unknown(backend)


def load_decoder(
    path: Path,
    spec: GraphSpec,
    backend: str,
    threads: int | None = None,
    bundle: Bundle | None = None,
) -> Decoder:
    """Load the LLM's graph for the named backend; never another one in its place."""
    if backend == "onnxruntime":
        from tiny_align.runtime.backends.onnxruntime import OrtDecoder

        return OrtDecoder(path, spec, threads)
    if backend == "tensorrt":
        from tiny_align.runtime.backends.tensorrt import TrtDecoder

        return TrtDecoder(path, spec, bundle)
    raise _unknown(backend)


def closed(spec: GraphSpec) -> BackendError:
    """What a backend says where it is used after `close`."""
    return BackendError(f"{spec.file} is closed: load the bundle again")


def _unknown(backend: str) -> BackendError:
    return BackendError(f"there is no backend {backend!r}: choose one of {', '.join(BACKENDS)}")
