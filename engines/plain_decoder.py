"""The LLM's plain graph, the one that TensorRT builds, as a decoder on ONNX Runtime.

For measuring, not for speed.
"""

from pathlib import Path

import numpy as np

from tiny_align.runtime.backends.base import Decoder, Scores
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.manifest import GraphSpec


class PlainDecoder(Decoder[dict[str, np.ndarray]]):
    """The graph takes the keys and values of all past positions, and returns them with the new."""

    name = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None):
        self._runner = OrtRunner(path, spec, threads)
        self._spec = spec

    def open_cache(self, capacity: int) -> dict[str, np.ndarray]:
        """An empty cache, input of the graph -> keys or values; it grows without `capacity`."""
        cache = {}
        for tensor in self._spec.inputs[1:]:
            shape = [size if isinstance(size, int) else 0 for size in tensor.shape]
            cache[tensor.name] = np.zeros(shape, tensor.dtype)
        return cache

    def run(self, embeddings: np.ndarray, cache: dict[str, np.ndarray], past: int) -> Scores:
        self.rewind(cache, past)
        new = np.ascontiguousarray(embeddings[None])  # (T, D) -> (1, T, D)
        outputs = self._runner({self._spec.inputs[0].name: new, **cache})
        ordered = [outputs[tensor.name] for tensor in self._spec.outputs]
        grown = ordered[-len(cache) :]  # between the logits and these there may be top-k outputs
        cache.update(zip(list(cache), grown, strict=True))
        return Scores(ordered[0][0, -1])

    def rewind(self, cache: dict[str, np.ndarray], length: int) -> None:
        for name, value in cache.items():
            cache[name] = value[:, :, :length]

    def close(self) -> None:
        self._runner.close()
