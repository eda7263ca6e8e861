"""An LLM's plain graph, the one that TensorRT builds, as a decoder on ONNX Runtime: to be measured, not to be fast."""

from pathlib import Path

import numpy as np

from tiny_align.runtime.backends.base import Decoder, Scores
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.manifest import GraphSpec


class PlainDecoder(Decoder):
    """Keys and values come out of the graph and, so many positions longer, go into it again."""

    name = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None):
        self._runner, self._spec = OrtRunner(path, spec, threads), spec

    def open_cache(self, capacity: int) -> dict[str, np.ndarray]:
        past = self._spec.inputs[1:]
        return {
            t.name: np.zeros([0 if size == "past" else size for size in t.shape], t.dtype)
            for t in past
        }

    def run(self, embeddings: np.ndarray, cache: dict[str, np.ndarray], past: int) -> Scores:
        self.rewind(cache, past)
        out = self._runner(
            {self._spec.inputs[0].name: np.ascontiguousarray(embeddings[None]), **cache}
        )
        logits, *others = (out[t.name] for t in self._spec.outputs)
        cache.update(
            zip(list(cache), others[-len(cache) :], strict=True)
        )  # the best tokens may stand before them
        return Scores(logits[0, -1])

    def rewind(self, cache: dict[str, np.ndarray], length: int) -> None:
        cache.update({name: value[:, :, :length] for name, value in cache.items()})

    def close(self) -> None:
        self._runner.close()
