"""Writes an LLM's files: its two graphs, whose weights are the same numbers, and its table.

The graphs are compared with PyTorch in FP32 first, whatever the precision; what the precision
costs is measured on texts that the LLM writes itself.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiny_align.export import parity
from tiny_align.export.llm_ort import llm_ort_graph
from tiny_align.export.llms import embedding_table, input_embedding, llm_graph
from tiny_align.export.mapped_weights import map_parameters
from tiny_align.export.options import ExportOptions
from tiny_align.export.progress import BeginPhase, no_bar
from tiny_align.export.quantise import Stored, output_layer, quantise
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
    no_blocks,
)
from tiny_align.runtime.backends.onnxruntime import OrtDecoder, OrtRunner
from tiny_align.runtime.backends.registry import load_decoder
from tiny_align.runtime.bundle.embeddings import EMBEDDINGS, SCALES, ZERO
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.bundle.onnx_weights import (
    Place,
    load_graph,
    read_weight,
    weight_products,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
            weights = LlmWeights(layers, head, rounding, source.stored, rounded_folder)
            weights.choose_forms(layer_weights(exact_folder / standard.file))
            stored: Stored = {}
            standard_path = folder / standard.file
            quantise(exact_folder / standard.file, standard_path, weights, "tensorrt", stored)
            weights.table = write_table(folder, source.llm, weights.head_blocks)
            ort_path = folder / ort.file
            quantise(exact_folder / ort.file, ort_path, weights, "onnxruntime", stored)
            begin("LLM: measure")
            with load_decoder(ort_path, ort, BACKEND) as decoder:
                n_beginning = len(source.beginning)
                figures = measure_divergence(decoder, source.llm, texts, n_beginning)
            figures["bits_per_weight"] = weights.bits
            standard = _in_form(standard, options.precision, figures)
            ort = _in_form(ort, options.precision, figures)
    standard = add_topk(folder / standard.file, standard)
    return dataclasses.replace(standard, backends={BACKEND: ort})


def _write_exact(folder: Path, source: LlmSource, begin: BeginPhase) -> tuple[GraphSpec, GraphSpec]:
    """Write both graphs in FP32 and compare them with PyTorch.

    The LLM's weights are then those of the file, mapped.
    """
    llm = source.llm
    lengths = parity.llm_lengths(llm.config, source.max_context)
    stored: dict[str, Place] = {}
    begin("LLM: trace")
    graph = llm_graph(llm)
    begin("LLM: write")
    standard = graph.save(folder / "llm.onnx", stored)
    graph.forget_weights()
    files = map_parameters(llm, folder / standard.file)
    begin("LLM: compare")
    prompts = parity.llm_prompts(llm, lengths=lengths)
    with OrtRunner(folder / standard.file, standard, prepack=False) as runner:
        standard = parity.checked(standard, parity.llm_parity(runner, prompts))
    begin("LLM for ONNX Runtime: trace")
    ort = llm_ort_graph(llm).save(folder / "llm.ort.onnx", stored)
    for file in files:  # the trace has read some
        file.release()
    begin("LLM for ONNX Runtime: compare")
    with OrtDecoder(folder / ort.file, ort, prepack=False) as decoder:
        ort = parity.checked(ort, parity.decoder_parity(decoder, prompts))
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


def layer_weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The weights (K, N) of a graph's products but the output layer's, mapped, by name."""
    model = load_graph(path)
    names = {node.input[1] for node in weight_products(model.graph)}
    names.discard(output_layer(model).input[1])
    for tensor in model.graph.initializer:
        if tensor.name in names:
            yield tensor.name, read_weight(tensor, path.parent)


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
    codes = np.ascontiguousarray(head.codes.T).view(np.uint8)
    codes ^= ZERO  # adds it
    scales = np.ascontiguousarray(head.scales.T)
    np.save(folder / EMBEDDINGS, codes)
    np.save(folder / SCALES, scales)
    return Table(_place(folder / EMBEDDINGS, codes), _place(folder / SCALES, scales))


def _place(path: Path, array: np.ndarray) -> Place:
    """Where the values of a .npy file are: after its header."""
    return Place(path.name, path.stat().st_size - array.nbytes, array.nbytes)
