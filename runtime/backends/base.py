"""The contract of a backend: `Backend` describes one, `Runner` and `Decoder` are what it loads.

`Runner`    one graph on named arrays: `Runner.__call__` checks names, types and sizes, and a
            backend implements `_run`.
`Chain`     two runners, one after the other: a backend may keep on its device what passes between
            them.
`Decoder`   the LLM with a KV cache: the cache is the backend's own memory, laid out for so many
            positions and for more when they are used.
`Scores`    what a decoder returns: the logits that the next token is chosen by.

registry.py lists the backends, and loads a graph with the one that is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.findings import Finding, Subject

# outputs of an LLM's graph that picks the top k tokens itself (export/topk.py)
TOPK_LOGITS = "best_logits"
TOPK_TOKENS = "best_tokens"

Arrays = dict[str, np.ndarray]  # name of an input or output -> its array
LoadedT = TypeVar("LoadedT", bound="Loaded")
CacheT = TypeVar("CacheT")  # the class of a decoder's caches


@dataclass(frozen=True)
class GraphFile:
    """A graph to load, and what it belongs to."""

    path: Path  # the ONNX file, or what the manifest has in its place for the backend
    spec: GraphSpec
    bundle: Bundle | None = None  # None: a graph by itself, as in an export
    name: str = ""  # in the bundle's manifest: "encoder", "projector" or "llm"
    user: Path | None = None  # folder of the user whose projector it is


class Loaded:
    """What a backend has loaded; a context manager."""

    name = ""  # the backend's, as --backend takes it

    def close(self) -> None:
        """Free what the graph holds."""

    def __enter__(self: LoadedT) -> LoadedT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Runner(Loaded, ABC):
    """One loaded graph."""

    def __init__(self, spec: GraphSpec):
        self.spec = spec

    def __call__(self, feed: Arrays) -> Arrays:
        """Run the graph: input name -> array to output name -> array.

        Raises:
            BackendError: a missing or unknown input, a wrong dtype or a wrong size.
        """
        self._check(feed)
        return self._run(feed)

    def _check(self, feed: Arrays) -> None:
        expected = [tensor.name for tensor in self.spec.inputs]
        if sorted(feed) != sorted(expected):
            raise BackendError(
                f"{self.spec.file}: expected the inputs {expected}, got {sorted(feed)}"
            )
        for tensor in self.spec.inputs:
            value = feed[tensor.name]
            if value.dtype.name != tensor.dtype or not _fits(value.shape, tensor.shape):
                raise BackendError(
                    f"{self.spec.file}: expected input {tensor.name} as {tensor.dtype} "
                    f"{list(tensor.shape)}, got {value.dtype} {list(value.shape)}"
                )

    @abstractmethod
    def _run(self, feed: Arrays) -> Arrays: ...

    def run_into(self, other: "Runner", feed: Arrays, rows: int | None = None) -> Arrays:
        """Chain.__call__, `other` being the second graph; a backend may do it without numpy."""
        between = {name: value[:, :rows] for name, value in self(feed).items()}
        return other(between)


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    """Whether a shape has the expected sizes; a named dimension may have any."""
    if len(shape) != len(expected):
        return False
    return all(isinstance(want, str) or size == want for size, want in zip(shape, expected))


@dataclass(frozen=True)
class Chain:
    """Two graphs, one after the other: the second takes what the first returns. It owns neither.

    Raises:
        BackendError: the second takes something else.
    """

    first: Runner
    second: Runner

    def __post_init__(self) -> None:
        outputs = [f"{t.name} {t.dtype}" for t in self.first.spec.outputs]
        inputs = [f"{t.name} {t.dtype}" for t in self.second.spec.inputs]
        if outputs != inputs:
            raise BackendError(
                f"{self.second.spec.file} takes {', '.join(inputs)}, {self.first.spec.file} gives "
                f"{', '.join(outputs)}: export the bundle again"
            )

    def __call__(self, feed: Arrays, rows: int | None = None) -> Arrays:
        """Run both: the first one's inputs to the second one's outputs.

        Args:
            rows: how many rows of the first one's (1, N, Da) the second gets, from the start;
                None: all.
        """
        return self.first.run_into(self.second, feed, rows)


@dataclass(frozen=True)
class Scores:
    """What a token is chosen by: the logits of all tokens, or the top k logits and their tokens."""

    logits: np.ndarray  # (V,) float32; or (K,), highest first
    tokens: np.ndarray | None = None  # (K,) the tokens of the logits; None: all, in order

    def topk(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The `n` tokens with the highest logits, highest first, and their logits.

        Fewer than `n` if the vocabulary is smaller.

        Raises:
            BackendError: the LLM's graph gives fewer.
        """
        if self.tokens is None:
            tokens = _topk(self.logits, n)
            return tokens, self.logits[tokens]
        if n > len(self.tokens):
            raise BackendError(
                f"expected a top_k of at most {len(self.tokens)}, as many tokens as the LLM's "
                f"graph gives, got {n}: ask for fewer"
            )
        return self.tokens[:n], self.logits[:n]


def _topk(logits: np.ndarray, n: int) -> np.ndarray:
    """Indices of the `n` highest of (V,), the highest first; of equals the first."""
    if n == 1:  # greedy decoding, at every token: no partition
        return logits.argmax(axis=0, keepdims=True)
    candidates = np.argpartition(logits, -n)[-n:] if n < len(logits) else np.arange(len(logits))
    return candidates[np.argsort(-logits[candidates], kind="stable")]


class Decoder(Loaded, ABC, Generic[CacheT]):
    """A loaded LLM. It holds no conversation: a cache does, and there may be many."""

    @abstractmethod
    def open_cache(self, capacity: int) -> CacheT:
        """Memory for the keys and values of `capacity` positions."""

    def grow(self, cache: CacheT, capacity: int) -> None:
        """Lay the cache out for `capacity` positions, more than before; what it holds stays.

        Nothing to do for a cache that takes any number.
        """

    @abstractmethod
    def run(self, embeddings: np.ndarray, cache: CacheT, past: int) -> Scores:
        """Run the LLM over embeddings (T, D) float32, after the cache's first `past` positions.

        Returns:
            The last position's scores; the next call with this cache may overwrite them.
        """

    @abstractmethod
    def rewind(self, cache: CacheT, length: int) -> None:
        """Forget all but the cache's first `length` positions; the next call goes on from there."""


@dataclass(frozen=True)
class Backend:
    """What the rest of the runtime has to know about a backend.

    A loader takes a graph and the number of CPU threads (None: all cores); it raises BackendError.
    A backend that runs the LLM only takes another one's `load_runner`, and names that one in
    `runner_graphs`.
    """

    name: str  # as --backend takes it, and the manifest has it if it has a graph for this backend
    load_runner: Callable[[GraphFile, int | None], Runner]  # encoder and projector
    load_decoder: Callable[[GraphFile, int | None], Decoder]  # the LLM
    check: Callable[[Subject], Iterator[Finding]]  # what `tiny-align doctor` says about it
    cache_sets: int = 1  # sets of keys and values that a conversation takes
    runner_graphs: str = ""  # the backend whose graphs `load_runner` takes; "": this one


def closed(spec: GraphSpec) -> BackendError:
    """The error of a graph that is used after `close`."""
    return BackendError(f"{spec.file} is closed: load the bundle again")
