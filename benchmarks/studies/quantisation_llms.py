"""A pretrained LLM in fewer bits, beside llama.cpp's forms of the very same weights.

The weights are moved off the grid of the file they came from (off_grid.py). Divergences and shares
are those of next_tokens.py, through the graph that ONNX Runtime decodes with, token by token, on
one thread. Speed is that of one token after POSITIONS others; all forms take turns.
"""

import contextlib
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks.studies.gguf_files import (
    TYPES,
    describe_gguf,
    llama_logits,
    load_llama,
    quantise_gguf,
    write_gguf,
)
from tiny_align.benchmarks.studies.next_tokens import (
    Reference,
    compare,
    decoder_logits,
    reference_answers,
    torch_logits,
)
from tiny_align.benchmarks.studies.off_grid import off_the_grid
from tiny_align.benchmarks.studies.prompts import PROMPTS
from tiny_align.benchmarks.studies.quantisation_ways import WAYS, Way, graph_bytes
from tiny_align.export.llm_ort import llm_ort_graph
from tiny_align.export.llms import (
    LLMS,
    embedding_scale,
    input_embedding,
    llm_graph,
    load_model,
)
from tiny_align.export.model_folder import model_folder
from tiny_align.export.pretrained import load_pretrained
from tiny_align.export.prompts import FIRST_DAY, prompt_spec
from tiny_align.export.quantise import output_layer
from tiny_align.export.sensitivity import (
    VALIDATION_TEXTS,
    Sensitivity,
    measure_sensitivities,
    write_texts,
)
from tiny_align.runtime.backends.base import Decoder
from tiny_align.runtime.backends.registry import load_decoder
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.bundle.onnx_weights import load_graph, stored_bytes, weight_products
from tiny_align.runtime.bundle.tensorrt_rules import count_by_rule, violations
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import write_json
from tiny_align.runtime.llm import encode_around

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BACKEND = "onnxruntime"
SLOW = ("HQQ", "k-quant")  # of ONNX Runtime's algorithms: minutes for such an LLM
POSITIONS = 64  # in the cache when a token is timed
FILE_TOKENS = 32  # of an answer, where two runtimes read one file

Row = dict[str, Any]
Step = Callable[[], object]  # decodes a token after POSITIONS others


class Llm:
    """A pretrained LLM off its file's grid, its FP32 graphs and answers; a folder keeps these."""

    def __init__(self, source: Path, folder: Path, n_prompts: int):
        """
        Args:
            source: a checkpoint; a .gguf file in it is the model's own.
            folder: where graphs and answers are, or will be.
        """
        self.model, self.tokenizer = load(source)
        off_the_grid(self.model)
        self.gguf = find_gguf(source)
        self.folder = folder
        self.exact = folder / "exact.ort.onnx"
        self.standard = folder / "exact.onnx"
        self.spec = self._export()
        self.reference = self._answer(n_prompts)
        table = input_embedding(self.model).weight.detach().numpy()
        self.embeddings = table * np.float32(embedding_scale(self.model))
        graph = load_graph(self.exact)
        self.head = output_layer(graph).input[1]
        names = {node.input[1] for node in weight_products(graph.graph)} - {self.head}
        weights = [tensor for tensor in graph.graph.initializer if tensor.name in names]
        self.n_weights = sum(int(np.prod(tensor.dims)) for tensor in weights)

    def _export(self) -> GraphSpec:
        path = self.folder / "spec.json"
        if not path.exists():
            with contextlib.redirect_stdout(sys.stderr):  # the exporter's progress
                llm_graph(self.model).save(self.standard)
                spec = llm_ort_graph(self.model).save(self.exact)
            write_json(path, asdict(spec))
        return GraphSpec(**json.loads(path.read_text(encoding="utf-8")))

    @functools.cached_property
    def sensitivities(self) -> dict[str, Sensitivity]:
        """Those that export measures, with Hessians."""
        before = beginning(self.tokenizer)
        texts = write_texts(self.model, before)[VALIDATION_TEXTS:]
        return measure_sensitivities(self.model, texts, len(before), hessians=True)

    def _answer(self, n_prompts: int) -> Reference:
        path = self.folder / f"reference-{n_prompts}.npz"
        if not path.exists():
            reference_answers(self.model, self.tokenizer, PROMPTS[:n_prompts]).save(path)
        return Reference.load(path)


def beginning(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Token ids before a user's words; without a chat template, before a text."""
    if tokenizer.chat_template is None:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = prompt_spec(tokenizer, None, "").on(FIRST_DAY)
    return encode_around(tokenizer.backend_tokenizer, prompt, prompt.instruction)[0]


def find_gguf(source: Path) -> Path | None:
    """A checkpoint's own GGUF file."""
    return next(iter(sorted(source.glob("*.gguf"))), None)


def load(source: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """An LLM in FP32 with its tokenizer, which need not have a chat template."""
    from transformers import AutoTokenizer

    folder = model_folder(str(source), "LLM", LLMS)
    tokenizer = load_pretrained(AutoTokenizer, folder)
    return load_model(folder, tokenizer), tokenizer


def measure_llm(
    source: Path, folder: Path, seconds: float, n_prompts: int, save: Callable[[Row], None]
) -> Row:
    """Every form's figures, ours and llama.cpp's.

    Args:
        folder: for graphs and files, about five times the FP32 weights, and for what is measured:
            a second call with it goes on where the first was stopped.
        seconds: for the timing of all forms together.
        save: is called with the figures so far after every form.
    """
    llm = Llm(source, folder, n_prompts)
    n_tokens = sum(len(answer) for answer in llm.reference.answers)
    report: Row = {"prompts": n_prompts, "tokens": n_tokens, "forms": []}
    paths = {}
    for form in tqdm(all_forms(llm), desc=source.name, unit="form"):
        path = folder / form_file(form)
        measured = folder / f"{path.name}.{n_prompts}.json"
        paths[path.name] = path
        if not measured.exists():
            write_json(measured, measure_form(form, llm, path))
        row = json.loads(measured.read_text(encoding="utf-8"))
        report["forms"].append({"file": path.name, **row})
        save(report)
    with contextlib.ExitStack() as stack:
        steps = {name: open_step(path, llm, stack) for name, path in paths.items()}
        speeds = time_steps(steps, seconds)
    for row in report["forms"]:
        row["tokens_per_second"] = speeds[row["file"]]
    return report


def measure_form(form: Way | str, llm: Llm, path: Path) -> Row:
    """Write a form of the LLM, and measure all but its speed."""
    if isinstance(form, str):
        return measure_gguf(form, llm, path)
    return measure_way(form, llm, path)


def all_forms(llm: Llm) -> list[Way | str]:
    """Ours, and llama.cpp's by name, if that is installed and the tokenizer's file is there."""
    forms: list[Way | str] = [way for way in WAYS if way.algorithm not in SLOW]
    if llm.gguf and find_spec("llama_cpp"):
        forms += TYPES
    return forms


def form_file(form: Way | str) -> str:
    """The name of a form's file, the same in every run."""
    if isinstance(form, str):
        return f"{form}.gguf"
    parts = [str(value) for value in asdict(form).values() if value]
    return f"{'-'.join(parts)}.onnx"


# --- one form ---


def measure_way(way: Way, llm: Llm, path: Path) -> Row:
    """A form of ours: what it costs, its bytes, and what TensorRT refuses of the standard graph."""
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # onnx would append to it
    sensitivities = llm.sensitivities if way.needs_sensitivities else None
    way.write(llm.exact, path, "onnxruntime", sensitivities)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        standard = Path(folder) / "llm.onnx"
        way.write(llm.standard, standard, "tensorrt", sensitivities)
        refused = count_by_rule(violations(load_graph(standard), standard.parent))
    with open_decoder(path, llm.spec) as decoder:
        figures = compare(llm.reference, decoder_logits(decoder, llm.embeddings))
    sizes = graph_sizes(path, llm, way)
    return {"runtime": "onnxruntime", **asdict(way), **figures, **sizes, "violations": refused}


def open_decoder(path: Path, spec: GraphSpec) -> Decoder:
    return load_decoder(path, spec, BACKEND, 1)


def graph_sizes(path: Path, llm: Llm, way: Way) -> Row:
    """Bytes of the layers, of the output layer and of the embedding table as export writes it."""
    head = 0
    for tensor in load_graph(path).graph.initializer:
        if tensor.name.startswith(llm.head):
            head += stored_bytes(tensor)
    layers = graph_bytes(path) - head
    return {
        "layers_bytes": layers,
        "head_bytes": head,
        "table_bytes": 0 if way.head == "int8" else 2 * llm.embeddings.size,  # 0: the head is it
        "bits": 8 * layers / llm.n_weights,
    }


def measure_gguf(kind: str, llm: Llm, path: Path) -> Row:
    """One of llama.cpp's forms; its table is the output layer too."""
    exact = path.with_name("exact.gguf")
    if not exact.exists():
        assert llm.gguf is not None
        write_gguf(llm.model, llm.gguf, exact)
    quantise_gguf(exact, path, kind)
    figures = compare(llm.reference, llama_logits(load_llama(path, llm.model.config)))
    row = {"runtime": "llama.cpp", "precision": kind, **figures, **describe_gguf(path)}
    row["bits"] = 8 * row["layers_bytes"] / llm.n_weights
    return row


# --- speed ---


def open_step(path: Path, llm: Llm, stack: contextlib.ExitStack) -> Step:
    """A call that decodes one token after POSITIONS others, with a form in ONNX or GGUF."""
    if path.suffix == ".gguf":
        llama = load_llama(path, llm.model.config)
        llama.logits([0] * POSITIONS)

        def step_llama() -> object:
            llama.rewind(POSITIONS)
            return llama.step(1)

        return step_llama
    decoder = stack.enter_context(open_decoder(path, llm.spec))
    cache = decoder.open_cache(POSITIONS + 1)
    decoder.run(llm.embeddings[[0] * POSITIONS], cache, 0)
    row = np.ascontiguousarray(llm.embeddings[[1]])
    return lambda: decoder.run(row, cache, POSITIONS)


def time_steps(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Tokens per second of every form, medians; the forms take turns, five tokens each."""
    step_s: dict[str, list[float]] = {label: [] for label in steps}
    started = time.perf_counter()
    for n_rounds in itertools.count():
        if n_rounds >= 3 and time.perf_counter() - started >= seconds:
            break
        for label, step in steps.items():
            step()  # the others have emptied the caches
            for _ in range(5):
                began = time.perf_counter()
                step()
                step_s[label].append(time.perf_counter() - began)
    return {label: 1 / float(np.median(times)) for label, times in step_s.items()}


# --- one file in two runtimes ---


def measure_file(source: Path, bundle: Path | None, n_prompts: int) -> Row:
    """The checkpoint's own GGUF file in llama.cpp, beside what was exported from it.

    Args:
        bundle: exported from the file; None: the same weights in FP32 PyTorch alone.
    Returns:
        `pytorch`: PyTorch in FP32 beside llama.cpp; `bundle`: the bundle beside llama.cpp;
        `bundle_pytorch`: the bundle beside PyTorch.
    Raises:
        TinyAlignError: no such file, or no llama.cpp.
    """
    file = find_gguf(source)
    if file is None or not find_spec("llama_cpp"):
        raise TinyAlignError(
            f"expected a .gguf file in {source} and the package llama-cpp-python, got none: "
            "run make pretrained and pip install .[peers]"
        )
    model, tokenizer = load(source)
    reference = reference_answers(model, tokenizer, PROMPTS[:n_prompts], FILE_TOKENS)
    llama = llama_logits(load_llama(file, model.config))
    report: Row = {"file": file.name, "prompts": n_prompts, "tokens": FILE_TOKENS}
    report["pytorch"] = compare(reference, torch_logits(model), exact=llama)
    if bundle is None:
        return report
    opened = Bundle.open(bundle, verify=False)
    spec = opened.manifest.graphs["llm"].on(BACKEND)
    table = np.load(bundle / "token_embeddings.npy", mmap_mode="r", allow_pickle=False)
    embeddings = table.astype(np.float32) * np.float32(embedding_scale(model))
    with open_decoder(opened.graph("llm", BACKEND), spec) as decoder:
        logits = decoder_logits(decoder, embeddings)
        report["bundle"] = compare(reference, logits, exact=llama)
        report["bundle_pytorch"] = compare(reference, logits)
    return report
