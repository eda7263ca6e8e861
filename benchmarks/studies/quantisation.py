"""What fewer bits cost the LLM and save: precisions, algorithms, block sizes, output layers.

    python -m benchmarks.studies.quantisation [--sentences 200] [--json]

Accuracy is that of the reference LLM on held-out typed sentences and on the shipped recordings. The
LLM was trained with its weights rounded to INT4 in blocks of 32, so exactly that form costs its
layers nothing. The same function with other weights (`off_the_grid`) has no such favourite.

Seconds, bits and speed are those of a sixteenth of Llama-3.2-1B with random weights: a layer's
weights and a sixteenth of its output layer's, one token, one thread, the forms alternated call by
call. Writes benchmarks/results/quantisation.json; the last line of stdout is the same document.
"""

import contextlib
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import rouge
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.pipelines import WEIGHTS
from tiny_align.benchmarks.studies.off_grid import off_the_grid
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.export.quantise import Form, forms, output_layer, quantise
from tiny_align.reference import corpus
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parents[1] / "results" / "quantisation.json"
COMMAND = "python -m benchmarks.studies.quantisation"
LLM = WEIGHTS / "llm"
LAYER = {  # weight -> its sizes in Llama-3.2-1B; the output layer's a sixteenth
    "query": (2048, 2048),
    "key": (2048, 512),
    "value": (2048, 512),
    "output": (2048, 2048),
    "gate": (2048, 8192),
    "up": (2048, 8192),
    "down": (8192, 2048),
    "logits": (2048, 128_256 // 16),
}


@dataclass(frozen=True)
class Way:
    """One way to store the weights."""

    precision: str
    block: int | None = None
    head: str = "int8"  # the output layer's precision
    algorithm: str = ""  # ONNX Runtime's, or "" for export's own rounding to nearest

    def write(self, source: Path, target: Path) -> None:
        """Quantise a graph; both have external data."""
        layers, head = forms(self.precision, self.head, self.block or 32)
        if not self.algorithm:
            quantise(source, target, layers, head)
            return
        with tempfile.TemporaryDirectory() as folder:
            # the library then finds no weight in the output layer
            with_head = Path(folder) / "head.onnx"
            quantise(source, with_head, Form(32), head)
            quantise_by_library(self.algorithm, self.block, with_head, target)


WAYS = [
    Way("fp32", head="fp32"),
    Way("fp16", head="fp16"),
    Way("int8", 32),
    Way("int8", 128),
    Way("int4", 32, head="fp32"),
    Way("int4", 32),
    Way("int4", 32, head="int4"),
    Way("int4", 64),
    Way("int4", 128),
    Way("int4", 128, head="int4"),
    Way("int4", 32, algorithm="asymmetric"),
    Way("int4", 128, algorithm="asymmetric"),
    Way("int4", 32, algorithm="HQQ"),
    Way("int4", 128, algorithm="HQQ"),
    Way("int4", 32, algorithm="k-quant"),
    Way("int4", 128, algorithm="k-quant"),
]


def quantise_by_library(algorithm: str, block: int, source: Path, target: Path) -> None:
    """INT4 by ONNX Runtime's quantisers with any zero point, which TensorRT does not take."""
    import onnx
    from onnxruntime.quantization import QuantFormat

    library = load_library()
    if algorithm == "asymmetric":
        config = library.DefaultWeightOnlyQuantConfig(block, False, quant_format=QuantFormat.QDQ)
    elif algorithm == "HQQ":
        config = library.HQQWeightOnlyQuantConfig(block)
    else:
        config = library.KQuantWeightOnlyQuantConfig()
    quantizer = library.MatMulNBitsQuantizer(
        onnx.load(str(source)),
        block_size=block,
        is_symmetric=False,
        accuracy_level=4,
        algo_config=config,
    )
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        quantizer.process()
    model = quantizer.model.model
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(
        model,
        str(target),
        save_as_external_data=True,
        location=f"{target.name}.data",
        size_threshold=256,
    )


def load_library() -> ModuleType:
    """ONNX Runtime's module of quantisers, which would log every weight."""
    import torch  # noqa: F401 - HQQ's; a second import costs nothing
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("neural_compressor").setLevel(logging.WARNING)
    return matmul_nbits_quantizer


# --- accuracy ---


class Comparison:
    """Compares forms of one LLM with its FP32 graph: on typed sentences, and on soft tokens."""

    def __init__(
        self,
        assistant: Assistant,
        exact: Path,
        spec: GraphSpec,
        sentences: list[corpus.Sentence],
        soft_tokens: list[np.ndarray],
    ):
        """
        Args:
            exact: the FP32 graph, and `spec` its description.
            soft_tokens: (T, D) of each recording.
        """
        self._bundle = assistant.bundle
        self._spec = spec
        self._sentences = sentences
        self._soft_tokens = soft_tokens
        self._prompts = []
        self._answers = []  # token ids with the end token
        self._texts = []
        self._logits = []  # log-probabilities at every token of an answer
        with self._load(exact) as llm:
            for sentence in sentences:
                prompt = llm.assemble(llm.embed(llm.encode_words(sentence.text)))
                tokens = list(llm.generate(prompt, Decoding()))
                answer = [*tokens, llm.spec.end_tokens[0]]
                self._prompts.append(prompt)
                self._answers.append(answer)
                self._texts.append(llm.tokenizer.decode(tokens))
                self._logits.append(log_probabilities(llm, prompt, answer))
            self._spoken = self._answer_speech(llm)

    @contextlib.contextmanager
    def _load(self, path: Path) -> Iterator[LanguageModel]:
        with PlainDecoder(path, self._spec, 1) as decoder:
            yield LanguageModel(self._bundle, decoder)

    def _answer_speech(self, llm: LanguageModel) -> list[str]:
        return [generate_text(llm, llm.assemble(each)) for each in self._soft_tokens]

    def measure(self, path: Path) -> dict[str, float]:
        """Of a graph: shares and means over tokens, sentences or recordings."""
        texts = []
        equal_tokens = []  # of each sentence, whether the graph has the same top token
        divergences = []
        with self._load(path) as llm:
            for i, prompt in enumerate(self._prompts):
                exact = self._logits[i]
                logits = log_probabilities(llm, prompt, self._answers[i])
                equal = exact.argmax(axis=1) == logits.argmax(axis=1)
                texts.append(self._texts[i] if equal.all() else generate_text(llm, prompt))
                equal_tokens.append(equal)
                divergences.append((np.exp(exact) * (exact - logits)).sum(axis=1))
            spoken = self._answer_speech(llm)
        return {
            "rougeL": rouge([sentence.answer for sentence in self._sentences], texts),
            "tokens_equal": float(np.mean(np.concatenate(equal_tokens))),
            "answers_equal": float(np.mean([equal.all() for equal in equal_tokens])),
            "divergence": float(np.mean(np.concatenate(divergences))),
            "spoken_rougeL": rouge(self._spoken, spoken),
        }


def log_probabilities(llm: LanguageModel, prompt: np.ndarray, answer: list[int]) -> np.ndarray:
    """(n, V): log-probabilities at every token of an answer, after the tokens before it."""
    cache = Cache()
    rows = [llm.prefill(np.ascontiguousarray(prompt, np.float32), cache).logits.copy()]
    for token in answer[:-1]:
        rows.append(llm.prefill(llm.embed([token]), cache).logits.copy())
    shifted = np.stack(rows) - np.max(rows, axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def generate_text(llm: LanguageModel, prompt: np.ndarray) -> str:
    return llm.tokenizer.decode(list(llm.generate(prompt, Decoding())))


def accuracy(
    bundle: Path,
    n_sentences: int,
    folder: Path,
    change: Callable[["torch.nn.Module"], None] | None = None,
) -> list[dict[str, float]]:
    """Every way's figures for the reference LLM, after `change` to its weights."""
    from tiny_align.export.llms import llm_graph, load_llm

    llm, _ = load_llm(str(LLM))
    if change:
        change(llm)
    exact = folder / "exact.onnx"
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's progress
        spec = llm_graph(llm).save(exact)
    sentences = corpus.sentences(n_sentences, 21, held_out=True)
    rows = []
    with Assistant.load(bundle, threads=1) as assistant:
        soft_tokens = []
        for utterance in split_of(load_dataset(shipped("voice")), "test"):
            features = assistant.features(utterance.load(assistant.sample_rate))
            soft_tokens.append(assistant.soft_tokens(features))
        comparison = Comparison(assistant, exact, spec, sentences, soft_tokens)
        for i, way in enumerate(tqdm(WAYS, desc="accuracy", unit="form")):
            path = folder / f"{i}.onnx"
            way.write(exact, path)
            rows.append(comparison.measure(path) | {"bytes": graph_bytes(path)})
    return rows


def graph_bytes(path: Path) -> int:
    """A graph's size with its external data."""
    return path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size


# --- cost ---


def cost(seconds: float, folder: Path) -> list[dict[str, float]]:
    """Every way's seconds, bits and time per token on a sixteenth of Llama-3.2-1B."""
    load_library()  # its import is no part of the seconds
    n_weights = sum(rows * columns for rows, columns in LAYER.values())
    spec = write_layer(folder / "layer.onnx")
    rows = []
    runners = []
    for i, way in enumerate(tqdm(WAYS, desc="weights", unit="form")):
        path = folder / f"{i}.onnx"
        began = time.perf_counter()
        way.write(folder / "layer.onnx", path)
        quantise_s = time.perf_counter() - began
        rows.append({"quantise_s": quantise_s, "bits": 8 * graph_bytes(path) / n_weights})
        runners.append(load_runner(path, spec, "onnxruntime", 1))
    for row, call_s in zip(rows, alternate_calls(runners, spec, seconds)):
        row["ms"] = 1e3 * float(np.median(call_s))
    exact_ms = rows[0]["ms"]
    for row in rows:
        row["speed"] = exact_ms / row["ms"]
        row["gb_s"] = row["bits"] * n_weights / 8e6 / row["ms"]
    return rows


def write_layer(path: Path) -> GraphSpec:
    """An FP32 graph of the weights in LAYER, each with an input of its own size."""
    import onnx

    rng = np.random.default_rng(0)
    weights = []
    nodes = []
    outputs = []
    for name, shape in LAYER.items():
        values = rng.standard_normal(shape, np.float32)
        names = [f"x{shape[0]}", f"{name}.weight"]
        weights.append(onnx.numpy_helper.from_array(values, names[1]))
        nodes.append(onnx.helper.make_node("MatMul", names, [name], name=name))
        outputs.append(TensorSpec(name, "float32", (1, 1, shape[1])))
    inputs = []
    for size in sorted({rows for rows, _ in LAYER.values()}):
        inputs.append(TensorSpec(f"x{size}", "float32", (1, 1, size)))
    spec = GraphSpec(path.name, "fp32", tuple(inputs), tuple(outputs))

    graph = onnx.helper.make_graph(
        nodes, "layer", _value_infos(inputs), _value_infos(outputs), weights
    )
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    assert output_layer(model).name == "logits"
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return spec


def _value_infos(tensors: list[TensorSpec]) -> list:
    import onnx

    kind = onnx.TensorProto.FLOAT
    return [onnx.helper.make_tensor_value_info(t.name, kind, t.shape) for t in tensors]


def alternate_calls(runners: list[Runner], spec: GraphSpec, seconds: float) -> list[list[float]]:
    """Seconds of every call; the runners take turns, and together are larger than any cache."""
    rng = np.random.default_rng(0)
    feed = {}
    for tensor in spec.inputs:
        feed[tensor.name] = rng.standard_normal(tensor.shape, np.float32)
    call_s: list[list[float]] = [[] for _ in runners]
    started = time.perf_counter()
    for n_rounds in itertools.count():
        if n_rounds >= 5 and time.perf_counter() - started >= seconds:
            break
        for runner, seconds_of_runner in zip(runners, call_s):
            began = time.perf_counter()
            runner(feed)
            seconds_of_runner.append(time.perf_counter() - began)
    return [seconds_of_runner[1:] for seconds_of_runner in call_s]  # the first call warms up


# --- the report ---


def measure(bundle: Path, n_sentences: int, seconds: float) -> dict[str, Any]:
    report = stamp(COMMAND)
    report["sentences"] = n_sentences
    with tempfile.TemporaryDirectory() as folder:
        costs = cost(seconds, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        reference = accuracy(bundle, n_sentences, Path(folder))
    with tempfile.TemporaryDirectory() as folder:  # onnx would append to weights that lie there
        moved = accuracy(bundle, n_sentences, Path(folder), off_the_grid)
    report["ways"] = []
    for i, way in enumerate(WAYS):
        figures = {"reference": reference[i], "off_the_grid": moved[i], "cost": costs[i]}
        report["ways"].append(asdict(way) | figures)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    head = [
        "layers",
        "block",
        "output layer",
        "algorithm",
        "ROUGE-L",
        "spoken",
        "tokens",
        "off the grid: ROUGE-L",
        "tokens",
        "divergence",
        "bits per weight",
        "speed",
        "GB/s",
        "seconds",
    ]
    rows = []
    for way in report["ways"]:
        reference = way["reference"]
        moved = way["off_the_grid"]
        costs = way["cost"]
        rows.append(
            [
                way["precision"],
                way["block"] or "",
                way["head"],
                way["algorithm"],
                f"{reference['rougeL']:.4f}",
                f"{reference['spoken_rougeL']:.3f}",
                f"{reference['tokens_equal']:.4f}",
                f"{moved['rougeL']:.4f}",
                f"{moved['tokens_equal']:.4f}",
                f"{moved['divergence']:.5f}",
                f"{costs['bits']:.2f}",
                f"{costs['speed']:.1f}x",
                f"{costs['gb_s']:.1f}",
                f"{costs['quantise_s']:.1f}",
            ]
        )
    return grid(head, rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=40, help="for the timing of all forms together"
    )
    args = parser.parse_args(argv)
    report = measure(args.bundle, args.sentences, args.seconds)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
