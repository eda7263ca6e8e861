"""What fewer bits cost the LLM and what they save: precisions, algorithms, block sizes, output layers.

    python -m benchmarks.studies.quantisation [--sentences 200] [--json]

Accuracy is that of the reference LLM on held-out typed sentences and on the shipped recordings. It was trained with its
weights rounded to INT4 in blocks of 32, so that exactly that form costs its layers nothing; the same function with
other weights (`off_the_grid`) has no such favourite. Seconds, bits and speed are those of a sixteenth of Llama-3.2-1B:
a layer's weights and a sixteenth of its output layer's, at one token, on one thread, the forms alternated call by call.
Writes benchmarks/results/quantisation.json; the last line of stdout is the same document.
"""

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import rouge
from tiny_align.benchmarks import finish
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.export.quantise import Form, forms, output_layer, quantise
from tiny_align.reference import corpus
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "quantisation.json"
COMMAND = "python -m benchmarks.studies.quantisation"
LLM = Path(__file__).parents[2] / "reference" / "weights" / "llm"
LAYER = {"query": (2048, 2048), "key": (2048, 512), "value": (2048, 512), "output": (2048, 2048)}
LAYER |= {
    "gate": (2048, 8192),
    "up": (2048, 8192),
    "down": (8192, 2048),
    "logits": (2048, 128_256 // 16),
}


@dataclass(frozen=True)
class Way:
    """One way to store the weights; `algorithm` is the library's, or "" for export's own rounding to nearest."""

    precision: str
    block: int | None = None
    head: str = "int8"
    algorithm: str = ""

    def write(self, source: Path, target: Path) -> None:
        """Both paths are of graphs with external data."""
        if not self.algorithm:
            return quantise(source, target, *forms(self.precision, self.head, self.block or 32))
        with tempfile.TemporaryDirectory() as folder:
            headed = (
                Path(folder) / "headed.onnx"
            )  # the library then finds no weight in the output layer
            quantise(source, headed, Form(32), forms(self.precision, self.head, self.block)[1])
            _library(self.algorithm, self.block, headed, target)


WAYS = (
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
    *(
        Way("int4", block, algorithm=name)
        for name in ("asymmetric", "HQQ", "k-quant")
        for block in (32, 128)
    ),
)


def _library(algorithm: str, block: int, source: Path, target: Path) -> None:
    """onnxruntime's INT4 quantisers whose zero lies anywhere: ONNX Runtime reads the result, TensorRT does not."""
    import onnx
    from onnxruntime.quantization import QuantFormat

    library = _quantisers()
    config = {
        "asymmetric": lambda: library.DefaultWeightOnlyQuantConfig(
            block, False, quant_format=QuantFormat.QDQ
        ),
        "HQQ": lambda: library.HQQWeightOnlyQuantConfig(block),
        "k-quant": library.KQuantWeightOnlyQuantConfig,
    }[algorithm]()
    model = onnx.load(str(source))
    quantizer = library.MatMulNBitsQuantizer(
        model, block_size=block, is_symmetric=False, accuracy_level=4, algo_config=config
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


def _quantisers():
    """onnxruntime's module of them, which would log every weight."""
    import torch  # noqa: F401 - HQQ's; a second import costs nothing
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("neural_compressor").setLevel(logging.WARNING)
    return matmul_nbits_quantizer


def off_the_grid(llm) -> None:
    """Give a Llama other weights that compute the same, in place.

    The norms' gains go into the products after them, the values are turned within every head, and the scale of what
    goes up to a hidden unit goes to what comes down from it.
    """
    import torch

    config, generator = llm.config, torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(config.head_dim, config.head_dim, generator=generator))[0]
    with torch.no_grad():
        for layer in llm.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
            _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
            value, output = attention.v_proj.weight, attention.o_proj.weight
            value.copy_((turn @ value.view(-1, config.head_dim, config.hidden_size)).view_as(value))
            output.copy_(
                (output.view(config.hidden_size, -1, config.head_dim) @ turn.T).view_as(output)
            )
            scale = mlp.up_proj.weight.norm(dim=1)
            mlp.up_proj.weight.div_(scale[:, None])
            mlp.down_proj.weight.mul_(scale)


def _fold(norm, linears) -> None:
    for linear in linears:
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1)


class Judge:
    """Compares forms of one LLM with its FP32 graph: on typed sentences, and on soft tokens."""

    def __init__(
        self,
        assistant: Assistant,
        exact: Path,
        spec: GraphSpec,
        sentences: list,
        heard: list[np.ndarray],
    ):
        self._bundle, self._spec, self._sentences, self._heard = (
            assistant.bundle,
            spec,
            sentences,
            heard,
        )
        with self._llm(exact) as llm:
            end = llm.spec.end_tokens[0]
            self._prompts = [llm.assemble(llm.embed(llm.encode_words(s.text))) for s in sentences]
            answers = [list(llm.generate(p, Decoding())) for p in self._prompts]
            self._said = [[*answer, end] for answer in answers]
            self._wanted = [
                self._logits(llm, p, said) for p, said in zip(self._prompts, self._said)
            ]
            self._texts = [llm.tokenizer.decode(answer) for answer in answers]
            self._spoken = [_text(llm, llm.assemble(soft_tokens)) for soft_tokens in heard]

    @contextlib.contextmanager
    def _llm(self, path: Path):
        with PlainDecoder(path, self._spec, 1) as decoder:
            yield LanguageModel(self._bundle, decoder)

    def _logits(self, llm: LanguageModel, prompt: np.ndarray, said: list[int]) -> np.ndarray:
        """(n, V): log-probabilities at every token of an answer, after the tokens before it."""
        cache = Cache()
        rows = [llm.prefill(np.ascontiguousarray(prompt, np.float32), cache).logits.copy()]
        rows += [llm.prefill(llm.embed([token]), cache).logits.copy() for token in said[:-1]]
        shifted = np.stack(rows) - np.max(rows, axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def measure(self, path: Path) -> dict:
        """Of a graph: shares and means over tokens, sentences or recordings."""
        with self._llm(path) as llm:
            got = [self._logits(llm, p, said) for p, said in zip(self._prompts, self._said)]
            same = [w.argmax(axis=1) == g.argmax(axis=1) for w, g in zip(self._wanted, got)]
            answers = [
                t if s.all() else _text(llm, p) for p, t, s in zip(self._prompts, self._texts, same)
            ]
            spoken = [_text(llm, llm.assemble(soft_tokens)) for soft_tokens in self._heard]
        divergence = [(np.exp(w) * (w - g)).sum(axis=1) for w, g in zip(self._wanted, got)]
        return {
            "rougeL": rouge([s.answer for s in self._sentences], answers),
            "tokens_equal": float(np.mean(np.concatenate(same))),
            "answers_equal": _mean(s.all() for s in same),
            "divergence": float(np.mean(np.concatenate(divergence))),
            "spoken_rougeL": rouge(self._spoken, spoken),
        }


def _text(llm: LanguageModel, prompt: np.ndarray) -> str:
    return llm.tokenizer.decode(list(llm.generate(prompt, Decoding())))


def _mean(values) -> float:
    return float(np.mean(list(values)))


def accuracy(bundle: Path, n_sentences: int, folder: Path, change=None) -> list[dict]:
    """Every way's figures for the reference LLM, after `change` to its weights."""
    from tiny_align.export.llms import llm_graph, load_llm

    llm, _ = load_llm(str(LLM))
    if change:
        change(llm)
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's progress
        spec = llm_graph(llm).save(folder / "exact.onnx")
    sentences, rows = corpus.sentences(n_sentences, 21, held_out=True), []
    with Assistant.load(bundle, threads=1) as assistant:
        recordings = split_of(load_dataset(shipped("voice")), "test")
        audio = [r.load(assistant.sample_rate) for r in recordings]
        heard = [assistant.soft_tokens(assistant.features(a)) for a in audio]
        judge = Judge(assistant, folder / "exact.onnx", spec, sentences, heard)
        for i, way in enumerate(tqdm(WAYS, desc="accuracy", unit="form")):
            way.write(folder / "exact.onnx", path := folder / f"{i}.onnx")
            rows.append(judge.measure(path) | {"bytes": _bytes(path)})
    return rows


def _bytes(path: Path) -> int:
    return path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size


def cost(seconds: float, folder: Path) -> list[dict]:
    """Every way's seconds, bits and time per token on a sixteenth of Llama-3.2-1B with random weights."""
    _quantisers()  # their import is no part of the seconds
    n_weights, runners, rows = sum(k * n for k, n in LAYER.values()), [], []
    spec = write_layer(folder / "layer.onnx")
    for i, way in enumerate(tqdm(WAYS, desc="weights", unit="form")):
        start, path = time.perf_counter(), folder / f"{i}.onnx"
        way.write(folder / "layer.onnx", path)
        rows.append(
            {"quantise_s": time.perf_counter() - start, "bits": 8 * _bytes(path) / n_weights}
        )
        runners.append(load_runner(path, spec, "onnxruntime", 1))
    for row, times in zip(rows, alternate(runners, spec, seconds)):
        row["ms"] = 1e3 * float(np.median(times))
    return [
        row
        | {"speed": rows[0]["ms"] / row["ms"], "gb_s": row["bits"] * n_weights / 8e6 / row["ms"]}
        for row in rows
    ]


def write_layer(path: Path) -> GraphSpec:
    """An FP32 graph of the weights in LAYER, each with an input of its own size."""
    import onnx

    rng, nodes, weights = np.random.default_rng(0), [], []
    for name, shape in LAYER.items():
        weights.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), f"{name}.weight")
        )
        nodes.append(
            onnx.helper.make_node("MatMul", [f"x{shape[0]}", f"{name}.weight"], [name], name=name)
        )
    spec = GraphSpec(
        path.name,
        "fp32",
        tuple(
            TensorSpec(f"x{k}", "float32", (1, 1, k))
            for k in sorted({k for k, _ in LAYER.values()})
        ),
        tuple(TensorSpec(name, "float32", (1, 1, n)) for name, (_, n) in LAYER.items()),
    )
    values = [
        [onnx.helper.make_tensor_value_info(t.name, 1, t.shape) for t in side]
        for side in (spec.inputs, spec.outputs)
    ]
    graph = onnx.helper.make_graph(nodes, "layer", *values, weights)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    assert output_layer(model).name == "logits"
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return spec


def alternate(runners: list, spec: GraphSpec, seconds: float) -> list[list[float]]:
    """Seconds of every call, one call of each runner after the other; together they are larger than any cache."""
    rng, times = np.random.default_rng(0), [[] for _ in runners]
    feed = {t.name: rng.standard_normal(t.shape, np.float32) for t in spec.inputs}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[-1]) < 5:
        for runner, spent in zip(runners, times):
            began = time.perf_counter()
            runner(feed)
            spent.append(time.perf_counter() - began)
    return [spent[1:] for spent in times]  # the first call warms up


def measure(bundle: Path, n_sentences: int, seconds: float) -> dict:
    report: dict = {
        "machine": describe(),
        "date": str(date.today()),
        "command": COMMAND,
        "sentences": n_sentences,
    }
    with tempfile.TemporaryDirectory() as folder:
        costs = cost(seconds, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        plain = accuracy(bundle, n_sentences, Path(folder))
        moved = accuracy(bundle, n_sentences, Path(folder), off_the_grid)
    rows = zip(WAYS, plain, moved, costs)
    report["ways"] = [
        {**vars(w), "reference": p, "off_the_grid": m, "cost": c} for w, p, m, c in rows
    ]
    return report


def table(report: dict) -> str:
    """The report as the README's table."""
    heads = ["layers", "block", "output layer", "algorithm", "ROUGE-L", "spoken", "tokens"]
    heads += [
        "off the grid: ROUGE-L",
        "tokens",
        "divergence",
        "bits per weight",
        "speed",
        "GB/s",
        "seconds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way in report["ways"]:
        ours, other, spent = way["reference"], way["off_the_grid"], way["cost"]
        cells = [way["precision"], way["block"] or "", way["head"], way["algorithm"]]
        cells += [
            f"{ours['rougeL']:.4f}",
            f"{ours['spoken_rougeL']:.3f}",
            f"{ours['tokens_equal']:.4f}",
        ]
        cells += [
            f"{other['rougeL']:.4f}",
            f"{other['tokens_equal']:.4f}",
            f"{other['divergence']:.5f}",
        ]
        cells += [
            f"{spent['bits']:.2f}",
            f"{spent['speed']:.1f}x",
            f"{spent['gb_s']:.1f}",
            f"{spent['quantise_s']:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=40, help="for the timing of all forms together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    report = measure(args.bundle, args.sentences, args.seconds)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
