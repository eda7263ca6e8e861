"""A rung's graph, and how far its outputs are from those of the bundle's own graph on recordings.

Half of the recordings calibrate an encoder, the other half measure it. Graphs run in ONNX
Runtime on the CPU, a rung's as its twin (fp16.py). Answers (ROUGE-L) are compared elsewhere,
by `benchmarks.studies.precision`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from tiny_align.engines import calibrate
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph, read_weight
from tiny_align.runtime.files import link_file, written_file
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel

MAX_ANSWERS = 8  # recordings that an LLM answers
MAX_TOKENS = 16  # of each answer


class SourceGraph:
    """A graph of a bundle, and a folder for graphs that are made of it.

    Weights that they share with it are links to the bundle's files.
    """

    def __init__(self, bundle: Bundle, name: str, folder: Path):
        self.bundle = bundle
        # a rung may quantise activations: its own file says so
        self.spec = dataclasses.replace(bundle.manifest.graphs[name], quantised_activations=None)
        self.path = bundle.graph(name)
        self.model = load_graph(self.path)
        self._folder = folder

    def read_weight(self, tensor: onnx.TensorProto) -> np.ndarray:
        return read_weight(tensor, self.path.parent)

    def write(self, model: onnx.ModelProto, name: str) -> Path:
        """Write a graph that was made of this one, whole or not at all."""
        with written_file(self._folder / name) as path:
            for file in data_files(model):
                link = self._folder / file
                link.unlink(missing_ok=True)  # a killed build's may be of another bundle
                link_file(self.path.parent / file, link)
            path.write_bytes(model.SerializeToString())
        return self._folder / name


class Meter(Protocol):
    """Makes the rungs of a graph and measures them."""

    def make_rung(self, precision: str) -> onnx.ModelProto:
        """The rung's graph before its conversion to FP16."""

    def min_cosine(self, path: Path) -> float:
        """The lowest cosine, over the recordings, of a graph's outputs to the bundle's own."""


class EncoderMeter:
    """Measures an encoder by its features."""

    def __init__(self, graph: SourceGraph, audios: list[np.ndarray]):
        self._graph = graph
        self._input = graph.spec.inputs[0].name
        frames = [graph.bundle.manifest.front_end(audio)[None] for audio in audios]
        self._calibration = frames[::2]
        self._test = frames[1::2]
        self._own_features = self._features(graph.path)

    def make_rung(self, precision: str) -> onnx.ModelProto:
        model = self._graph.model
        if precision != "int8":
            return model
        exposed = self._graph.write(calibrate.with_product_inputs(model), "watched.onnx")
        with OrtRunner(exposed, self._graph.spec) as runner:
            runs = (runner({self._input: frames}) for frames in self._calibration)
            scales = calibrate.find_scales(runs)
        exposed.unlink()
        return calibrate.to_int8(model, scales, self._graph.read_weight)

    def min_cosine(self, path: Path) -> float:
        return min(map(cosine, self._features(path), self._own_features))

    def _features(self, path: Path) -> list[np.ndarray]:
        with OrtRunner(path, self._graph.spec) as runner:
            return [runner({self._input: frames})["features"] for frames in self._test]


class LlmMeter:
    """Measures an LLM by its logits: after a prompt with speech and at each token of its answer."""

    def __init__(self, graph: SourceGraph, audios: list[np.ndarray]):
        self._graph = graph
        self._prompts: list[np.ndarray] = []
        self._answers: list[list[int]] = []
        with Assistant.load(graph.bundle) as assistant:
            for audio in audios[:MAX_ANSWERS]:
                soft_tokens = assistant.soft_tokens(assistant.features(audio))
                prompt = assistant.llm.assemble(soft_tokens)
                answer = list(assistant.llm.generate(prompt, Decoding(max_tokens=MAX_TOKENS)))
                self._prompts.append(prompt)
                self._answers.append(answer)
        self._own_logits = self._logits(graph.path)

    def make_rung(self, precision: str) -> onnx.ModelProto:
        return self._graph.model

    def min_cosine(self, path: Path) -> float:
        return min(map(cosine, self._logits(path), self._own_logits))

    def _logits(self, path: Path) -> list[np.ndarray]:
        """For each answer of n tokens (1 + n, V): the logits after the prompt and each token."""
        results = []
        with PlainDecoder(path, self._graph.spec) as decoder:
            llm = LanguageModel(self._graph.bundle, decoder)
            for prompt, answer in zip(self._prompts, self._answers):
                cache = Cache()
                steps = [np.ascontiguousarray(prompt, np.float32)]
                for token in answer:
                    steps.append(llm.embed([token]))
                logits = [llm.prefill(step, cache).logits.copy() for step in steps]
                results.append(np.stack(logits))
        return results


METERS: dict[str, Callable[[SourceGraph, list[np.ndarray]], Meter]] = {
    "encoder": EncoderMeter,
    "llm": LlmMeter,
}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two arrays as vectors; 0 if one of them has a value that is not finite."""
    a = a.ravel().astype(np.float64)
    b = b.ravel().astype(np.float64)
    with np.errstate(invalid="ignore"):
        value = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(value) if np.isfinite(value) else 0.0
