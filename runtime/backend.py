"""The one contract every backend fulfils: a graph that takes and gives named arrays.

`Runner.__call__` checks names, types and sizes once, here; a backend implements `_run`. Values of an
output named in `keep` stay in the backend's own form and may be fed back, so that a KV cache is never copied
through numpy.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from tiny_align.runtime.bundle import GraphSpec, TensorSpec
from tiny_align.runtime.errors import BackendError

BACKENDS = ("onnxruntime",)


class Runner(ABC):
    """One loaded graph; a context manager."""

    name = ""  # the backend's name, as --backend takes it

    def __init__(self, spec: GraphSpec):
        self.spec = spec

    def __call__(self, feed: dict, keep: tuple[str, ...] = ()) -> dict:
        """Run the graph.

        Args:
            feed: input name -> numpy array, or a value an earlier call kept.
            keep: outputs to return in the backend's own form instead of as numpy arrays.
        Raises:
            BackendError: a missing or unknown input, a wrong dtype or a wrong size.
        """
        self._check(feed)
        return self._run(feed, keep)

    def _check(self, feed: dict) -> None:
        expected = [t.name for t in self.spec.inputs]
        if sorted(feed) != sorted(expected):
            raise BackendError(f"{self.spec.file} takes the inputs {expected}, given were {sorted(feed)}")
        for tensor in self.spec.inputs:
            value = feed[tensor.name]
            if isinstance(value, np.ndarray) and not _fits(value, tensor):
                raise BackendError(
                    f"{self.spec.file}: input {tensor.name} must be {tensor.dtype} {list(tensor.shape)}, "
                    f"given was {value.dtype} {list(value.shape)}"
                )

    @abstractmethod
    def _run(self, feed: dict, keep: tuple[str, ...]) -> dict: ...

    def close(self) -> None:  # noqa: B027 - optional
        """Free what the graph holds."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _fits(value: np.ndarray, tensor: TensorSpec) -> bool:
    return value.dtype.name == tensor.dtype and len(value.shape) == len(tensor.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, tensor.shape)
    )  # fmt: skip


def load_runner(path: Path, spec: GraphSpec, backend: str, threads: int | None = None) -> Runner:
    """Load one graph with the named backend; never another one in its place."""
    if backend == "onnxruntime":
        from tiny_align.runtime.ort import OrtRunner

        return OrtRunner(path, spec, threads)
    raise BackendError(f"there is no backend {backend!r}: choose one of {', '.join(BACKENDS)}")
