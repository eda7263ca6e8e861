"""The steps of the precision ladder (ladder.py): a rung's graph is made, measured against the bundle's own, and kept.

Measuring takes half of the recordings, calibrating the other half.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from tiny_align.engines import calibrate, fp16
from tiny_align.engines.ladder import AUTO, OWN, Choice, Ladder
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import link_file, written_file
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel

MAX_ANSWERS, MAX_TOKENS = 8, 16  # of an LLM: recordings, and tokens of each answer


def climb(bundle: Bundle, name: str, ladder: Ladder, folder: Path) -> Choice:
    """As ladder.choose."""
    graph, own = Graph(bundle, name, folder), bundle.manifest.graphs[name].precision
    rungs, accuracy = ladder.rungs(name, own), {}
    audios = [read_audio(path, bundle.manifest.front_end.sample_rate) for path in ladder.recordings]
    judge = JUDGES[name](graph, audios)
    for precision, bound in rungs.items():
        model = judge.model(precision)
        twin = graph.write(fp16.twin(model), f"{name}.twin.onnx")
        accuracy[precision] = {"cosine": judge.cosine(twin), "bound": bound}
        twin.unlink()
        if accuracy[precision]["cosine"] >= bound:
            made = graph.write(fp16.half(model, graph.values), f"{name}.{precision}.onnx")
            return Choice(
                made, precision if own in (precision, OWN) else f"{own}/{precision}", accuracy
            )
    if ladder.precision != AUTO:
        raise BackendError(_beyond(name, accuracy))
    return Choice(graph.path, own, accuracy)


def _beyond(name: str, accuracy: dict) -> str:
    ((precision, found),) = accuracy.items()
    return (
        f"the graph {name!r} in {precision} has a cosine of {found['cosine']:.5f} to the bundle's own, at least "
        f"{found['bound']} is wanted: choose --precision {AUTO} or {OWN}"
    )


class Graph:
    """A graph of a bundle, and others made of it in a folder; weights they share are links to the bundle's files."""

    def __init__(self, bundle: Bundle, name: str, folder: Path):
        self.bundle, self._folder = bundle, folder
        # a rung may quantise activations: its file tells
        self.spec = replace(bundle.manifest.graphs[name], quantised_activations=None)
        self.path = bundle.graph(name)
        self.model = onnx.load(self.path, load_external_data=False)

    def values(self, tensor) -> np.ndarray:
        """A tensor's values, those in another file mapped; onnx's own reader refuses a file that is linked."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        place = {e.key: e.value for e in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        start = int(place.get("offset", 0))
        return np.memmap(
            self.path.parent / place["location"], dtype, "r", start, tuple(tensor.dims)
        )

    def write(self, model: onnx.ModelProto, name: str) -> Path:
        """Write a graph that was made of this one, whole or not at all."""
        places = {
            e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
        }
        with written_file(self._folder / name) as path:
            for place in places:
                (self._folder / place).unlink(
                    missing_ok=True
                )  # a killed build's may be of another bundle
                link_file(self.path.parent / place, self._folder / place)
            path.write_bytes(model.SerializeToString())
        return self._folder / name


class Features:
    """Judges an encoder: half of the recordings calibrate, the others measure."""

    def __init__(self, graph: Graph, audios: list[np.ndarray]):
        self._graph, self._input = graph, graph.spec.inputs[0].name
        rows = [graph.bundle.manifest.front_end(audio)[None] for audio in audios]
        self._calibrating, self._measuring = rows[::2], rows[1::2]
        self._exact = self._features(graph.path)

    def model(self, precision: str) -> onnx.ModelProto:
        """What becomes the rung's graph in FP16."""
        if precision != "int8":
            return self._graph.model
        watched = self._graph.write(calibrate.watched(self._graph.model), "watched.onnx")
        with OrtRunner(watched, self._graph.spec) as run:
            scales = calibrate.scales(run({self._input: rows}) for rows in self._calibrating)
        watched.unlink()
        return calibrate.int8(self._graph.model, scales, self._graph.values)

    def cosine(self, path: Path) -> float:
        return min(map(cosine, self._features(path), self._exact))

    def _features(self, path: Path) -> list[np.ndarray]:
        with OrtRunner(path, self._graph.spec) as run:
            return [run({self._input: rows})["features"] for rows in self._measuring]


class Logits:
    """Judges an LLM by what it makes of speech: its logits after the prompt and after every token of the own answer."""

    def __init__(self, graph: Graph, audios: list[np.ndarray]):
        self._graph = graph
        with Assistant.load(graph.bundle) as assistant:
            spoken = [
                assistant.soft_tokens(assistant.features(audio)) for audio in audios[:MAX_ANSWERS]
            ]
            self._prompts = [assistant.llm.assemble(soft_tokens) for soft_tokens in spoken]
            self._answers = [
                list(assistant.llm.generate(prompt, Decoding(max_tokens=MAX_TOKENS)))
                for prompt in self._prompts
            ]
        self._exact = self._logits(graph.path)

    def model(self, precision: str) -> onnx.ModelProto:
        """What becomes the rung's graph in FP16."""
        return self._graph.model

    def cosine(self, path: Path) -> float:
        return min(map(cosine, self._logits(path), self._exact))

    def _logits(self, path: Path) -> list[np.ndarray]:
        with PlainDecoder(path, self._graph.spec) as decoder:
            llm = LanguageModel(self._graph.bundle, decoder)
            return [
                _said(llm, prompt, answer) for prompt, answer in zip(self._prompts, self._answers)
            ]


def _said(llm: LanguageModel, prompt: np.ndarray, answer: list[int]) -> np.ndarray:
    """(1 + n, V): the logits after the prompt and after each of an answer's n tokens."""
    cache = Cache()
    steps = [np.ascontiguousarray(prompt, np.float32), *(llm.embed([token]) for token in answer)]
    return np.stack([llm.prefill(step, cache).logits.copy() for step in steps])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as wholes; 0 where one of them has gone beyond all numbers."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    with np.errstate(invalid="ignore"):
        value = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(value) if np.isfinite(value) else 0.0


JUDGES = {"encoder": Features, "llm": Logits}
