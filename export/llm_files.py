"""Writes an LLM's files: its two graphs, whose weights are the same numbers, and its table.

The graphs are compared with PyTorch in FP32 first, whatever the precision; what the precision
costs is measured on texts that the LLM writes itself.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiny_align.export import parity
from tiny_align.export.graphs import Graph
from tiny_align.export.llm_ort import llm_ort_graph
from tiny_align.export.llms import embedding_table, input_embedding, llm_graph
from tiny_align.export.options import ExportOptions
from tiny_align.export.packing import share_weights
from tiny_align.export.progress import BeginPhase, no_bar, prefixed
from tiny_align.export.quantise import output_layer, quantise
from tiny_align.export.sensitivity import (
    VALIDATION_TEXTS,
    measure_divergence,
    measure_sensitivities,
    write_texts,
)
from tiny_align.export.topk import add_topk
from tiny_align.export.weight_forms import (
    Blocks,
    LlmWeights,
    ReadBlocks,
    Rounding,
    Table,
    forms,
    module_rows,
    no_blocks,
)
from tiny_align.runtime.backends.registry import load_decoder, load_runner
from tiny_align.runtime.bundle.embeddings import EMBEDDINGS, SCALES
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.bundle.onnx_weights import (
    Place,
    load_graph,
    read_weight,
    weight_products,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    CheckGraph = Callable[[Path, GraphSpec], parity.Differences]

BACKEND = "onnxruntime"  # runs the graphs here
LARGE_VOCABULARY = 8192  # rows of an embedding table that is worth INT8


@dataclass(frozen=True)
class LlmSource:
    """A loaded LLM and what writing it needs to know.

    Attributes:
        max_context: positions of the bundle.
        beginning: token ids before a user's words in the prompt.
        stored: gives the blocks that the LLM's own file has for a module.
    """

    llm: "PreTrainedModel"
    max_context: int
    beginning: list[int]
    stored: ReadBlocks = no_blocks


def write_llm(
    folder: Path, source: LlmSource, options: ExportOptions, begin: BeginPhase = no_bar
) -> GraphSpec:
    """Write both graphs and the embedding table; weights that are equal are stored once."""
    layers, head = forms(options.precision, options.head_precision, options.block_size)
    standard_path = folder / "llm.onnx"
    ort_path = folder / "llm.ort.onnx"
    # On the disk of the bundle, which must have room anyway.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        exact_folder = Path(temporary) / "fp32"
        exact_folder.mkdir()
        standard, ort = _write_exact(exact_folder, source, begin)
        if layers.bits == head.bits == 32:
            write_table(folder, source.llm, None)
            for file in exact_folder.iterdir():
                file.replace(folder / file.name)
        else:
            begin("LLM: measure sensitivities")
            texts, rounding = _calibrate(source, options)
            begin("LLM: quantise")
            rounded_folder = Path(temporary) / "rounded"
            rounded_folder.mkdir()
            modules = module_rows(source.llm)
            weights = LlmWeights(layers, head, rounding, modules, source.stored, rounded_folder)
            weights.choose_forms(_layer_weights(exact_folder / standard_path.name))
            quantise(exact_folder / standard_path.name, standard_path, weights, "tensorrt")
            weights.table = write_table(folder, source.llm, weights.head_blocks)
            quantise(exact_folder / ort_path.name, ort_path, weights, "onnxruntime")
            begin("LLM: measure")
            figures = _measure(source, ort_path, ort, texts)
            figures["bits_per_weight"] = weights.bits
            standard = _in_form(standard, options.precision, figures)
            ort = _in_form(ort, options.precision, figures)
    standard = add_topk(standard_path, standard)
    share_weights(standard_path, ort_path)
    return dataclasses.replace(standard, backends={BACKEND: ort})


def _write_exact(folder: Path, source: LlmSource, begin: BeginPhase) -> tuple[GraphSpec, GraphSpec]:
    """Write both graphs in FP32 and compare them with PyTorch."""
    llm = source.llm
    lengths = parity.llm_lengths(llm.config, source.max_context)
    prompts = parity.llm_prompts(llm, lengths=lengths)

    def check_standard(path: Path, spec: GraphSpec) -> parity.Differences:
        with load_runner(path, spec, BACKEND) as runner:
            return parity.llm_parity(runner, prompts)

    def check_ort(path: Path, spec: GraphSpec) -> parity.Differences:
        with load_decoder(path, spec, BACKEND) as decoder:
            return parity.decoder_parity(decoder, prompts)

    def write(
        file: str,
        trace: Callable[["PreTrainedModel"], Graph],
        check: "CheckGraph",
        begin_step: BeginPhase,
    ) -> GraphSpec:
        begin_step("trace")
        graph = trace(llm)
        begin_step("write")
        spec = graph.save(folder / file)
        del graph  # frees its copies of weights
        begin_step("compare")
        differences = check(folder / file, spec)
        parity.check(Path(file).stem, differences)
        return dataclasses.replace(spec, parity=differences.figures())

    standard = write("llm.onnx", llm_graph, check_standard, prefixed(begin, "LLM"))
    ort_begin = prefixed(begin, "LLM for ONNX Runtime")
    ort = write("llm.ort.onnx", llm_ort_graph, check_ort, ort_begin)
    return standard, ort


def _calibrate(source: LlmSource, options: ExportOptions) -> tuple[list[torch.Tensor], Rounding]:
    """Texts to measure the finished graph on, and how the weights are rounded."""
    texts = write_texts(source.llm, source.beginning)
    sensitivities = {}
    if options.precision == "int4":
        sensitivities = measure_sensitivities(
            source.llm,
            texts[VALIDATION_TEXTS:],
            len(source.beginning),
            hessians=options.rounding == "gptq",
        )
    rounding = Rounding(options.rounding, sensitivities, options.max_bits)
    return texts[:VALIDATION_TEXTS], rounding


def _layer_weights(path: Path) -> Iterator[np.ndarray]:
    """The weights (K, N) of a graph's products but the output layer's, mapped."""
    model = load_graph(path)
    names = {node.input[1] for node in weight_products(model.graph)}
    names.discard(output_layer(model).input[1])
    for tensor in model.graph.initializer:
        if tensor.name in names:
            yield read_weight(tensor, path.parent)


def _measure(
    source: LlmSource, path: Path, spec: GraphSpec, texts: list[torch.Tensor]
) -> dict[str, float]:
    """How far ONNX Runtime's graph is from PyTorch in FP32."""
    with load_decoder(path, spec, BACKEND) as decoder:
        divergence = measure_divergence(decoder, source.llm, texts, len(source.beginning))
    return {
        "kl_to_pytorch": divergence["nats"],
        "same_next_token": divergence["next_token"],
    }


def _in_form(spec: GraphSpec, precision: str, figures: dict[str, float]) -> GraphSpec:
    parity_figures = {**spec.parity, **figures}
    return dataclasses.replace(spec, precision=precision, parity=parity_figures)


def write_table(folder: Path, llm: "PreTrainedModel", head: Blocks | None) -> Table | None:
    """Write the embedding table, in INT8 if it is large and the output layer's too; else FP16.

    Args:
        head: the output layer's weight (D, V), if it is in integers.
    Returns:
        Where the INT8 table is.
    """
    embedding = input_embedding(llm)
    output = llm.get_output_embeddings()
    is_tied = isinstance(output, torch.nn.Linear) and output.weight is embedding.weight
    is_large = embedding.num_embeddings > LARGE_VOCABULARY
    if head is None or head.bits != 8 or not is_tied or not is_large:
        np.save(folder / EMBEDDINGS, embedding_table(llm))
        return None
    codes = np.empty(head.codes.shape[::-1], np.uint8)
    np.add(head.codes.T, 128, out=codes, casting="unsafe")
    scales = np.ascontiguousarray(head.scales.T)
    np.save(folder / EMBEDDINGS, codes)
    np.save(folder / SCALES, scales)
    return Table(_place(folder / EMBEDDINGS, codes), _place(folder / SCALES, scales))


def _place(path: Path, array: np.ndarray) -> Place:
    """Where the values of a .npy file are: after its header."""
    return Place(path.name, path.stat().st_size - array.nbytes, array.nbytes)
