"""A backend in one file: a bundle's plain graphs, in ONNX Runtime sessions of its own, slowly.

It shows what a backend has to have. test_backends.py registers it by one line.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from tiny_align.runtime.backends.base import Backend, Decoder, Runner, Scores
from tiny_align.runtime.findings import Finding

NAME = "toy"


def open_session(path: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class ToyRunner(Runner):
    """One graph."""

    name = NAME

    def __init__(self, graph, threads):
        super().__init__(graph.spec)
        self._session = open_session(graph.path, threads)

    def _run(self, feed):
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._session.run(names, feed)))


class ToyDecoder(Decoder[dict]):
    """The LLM: keys and values come out of the graph, and go into it at the next step."""

    name = NAME

    def __init__(self, graph, threads):
        self._spec = graph.spec
        self._session = open_session(graph.path, threads)

    def open_cache(self, capacity):
        cache = {}
        for tensor in self._spec.inputs[1:]:
            shape = [0 if isinstance(size, str) else size for size in tensor.shape]
            cache[tensor.name] = np.zeros(shape, tensor.dtype)
        return cache

    def run(self, embeddings, cache, past):
        self.rewind(cache, past)
        feed = {self._spec.inputs[0].name: embeddings[None], **cache}
        logits, *outputs = self._session.run(None, feed)
        cache.update(zip(cache, outputs[-len(cache) :]))
        return Scores(logits[0, -1])

    def rewind(self, cache, length):
        for name, value in cache.items():
            cache[name] = value[:, :, :length]


def check(subject):
    yield Finding(NAME, "built in", True)


BACKEND = Backend(NAME, ToyRunner, ToyDecoder, check, cache_sets=3)
