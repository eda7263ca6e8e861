"""Writes a bundle: loads the models, exports their graphs, quantises them and checks their parity.

Models come from local folders or hub ids, as transformers' `from_pretrained` takes them; an LLM
from a GGUF file too.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiny_align.align.model.projector import BridgeFormer
from tiny_align.export import parity
from tiny_align.export.encoders import FAMILIES, LayeredEncoder, encoder_graph, load_encoder
from tiny_align.export.gguf_llm import GgufLlm
from tiny_align.export.graphs import Graph
from tiny_align.export.int8 import multiply_int8, store_int8
from tiny_align.export.llm_files import LARGE_VOCABULARY, LlmSource, write_llm
from tiny_align.export.llms import (
    LLMS,
    input_embedding,
    listed_end_tokens,
    llm_spec,
    load_model,
    load_tokenizer,
)
from tiny_align.export.model_folder import model_folder
from tiny_align.export.options import ExportOptions
from tiny_align.export.packing import share_weights
from tiny_align.export.progress import BeginPhase, no_bar
from tiny_align.export.projector import (
    check_binding,
    find_weights,
    make_projector,
    projector_graph,
)
from tiny_align.export.prompts import FIRST_DAY, prompt_spec
from tiny_align.export.weight_forms import ReadBlocks, forms, no_blocks
from tiny_align.export.windows import MARGIN_S, window_spec
from tiny_align.runtime import checks
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.embeddings import EMBEDDINGS, load_table
from tiny_align.runtime.bundle.manifest import (
    MANIFEST,
    EncoderSpec,
    GraphSpec,
    LlmSpec,
    Manifest,
    PromptSpec,
    write_manifest,
)
from tiny_align.runtime.bundle.onnx_weights import load_graph
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.bundle.tensorrt_rules import Violation, summary, violations
from tiny_align.runtime.bundle.users import user_names
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import sha256, write_errors, written_folder
from tiny_align.runtime.llm import encode_around, encode_in_place
from tiny_align.runtime.readout import Readout, ctc_scale
from tiny_align.runtime.speech_vocabulary import SPEECH_TOKENS
from tiny_align.runtime.windows import WindowSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    CheckGraph = Callable[[Path, GraphSpec], parity.Differences]

BACKEND = "onnxruntime"  # runs the graphs here


@dataclass(frozen=True)
class Sources:
    """The loaded models, and what the manifest records of the LLM and its prompt."""

    encoder: LayeredEncoder
    llm: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    llm_spec: LlmSpec
    prompt: PromptSpec
    projector: BridgeFormer
    stored: ReadBlocks = no_blocks  # of the LLM's file, if it is in GGUF

    def llm_source(self) -> LlmSource:
        """What the LLM's files are written from."""
        backend = self.tokenizer.backend_tokenizer
        today = self.prompt.on(FIRST_DAY)  # the same on any day
        beginning, _ = encode_around(backend, today, today.instruction)
        return LlmSource(self.llm, self.llm_spec.max_context, beginning, self.stored)


def export_bundle(options: ExportOptions, out: Path, begin: BeginPhase = no_bar) -> Manifest:
    """Export everything to `out`, which appears whole or not at all.

    A bundle that is there already is replaced, unless it has users.

    Args:
        begin: called at each phase of `progress.PHASES`.
    Raises:
        TinyAlignError: a model that cannot be loaded or is of no supported architecture, a graph
            that differs from PyTorch by parity.TOLERANCE or more, or an `out` with something else
            in it.
    """
    out = Path(out)
    _check_options(options)
    _check_out(out)
    sources = load_sources(options)
    with write_errors(out), written_folder(out) as folder:
        manifest = _write(folder, options, sources, begin)
        begin("check and hash")
        check_rules(folder, manifest)
        return write_manifest(folder, manifest)


# --- what TensorRT takes ---


def tensorrt_violations(folder: Path, manifest: Manifest) -> dict[str, list[Violation]]:
    """The nodes that TensorRT would refuse, by graph; graphs that it takes are left out.

    Args:
        folder: of the bundle, finished or not.
    """
    refused = {}
    for name, spec in manifest.graphs.items():
        profile = graph_profile(spec, manifest.dims)
        found = violations(load_graph(folder / spec.file), folder, profile)
        if found:
            refused[name] = found
    return refused


def check_rules(folder: Path, manifest: Manifest) -> None:
    """Refuse graphs that TensorRT would refuse.

    Raises:
        TinyAlignError: there is one; it names the first node that breaks each rule.
    """
    for name, found in tensorrt_violations(folder, manifest).items():
        raise TinyAlignError(
            f"TensorRT would refuse the graph {name!r}: {summary(found)}. Nothing was written; "
            "report the model and the versions of torch and transformers"
        )


# --- checks ---


def _check_options(options: ExportOptions) -> None:
    checks.check("max_context", options.max_context, "--max-context")
    checks.check("soft_tokens", options.soft_tokens, "--soft-tokens")
    checks.check("window_s", options.window_s, "--window-s")
    shortest = 3 * MARGIN_S
    if 0 < options.window_s < shortest:
        raise TinyAlignError(
            f"--window-s is {options.window_s}: give at least {shortest:g}, or 0 for no windows"
        )
    forms(options.precision, options.head_precision, options.block_size)
    if options.sentences and not Path(options.sentences).is_file():
        raise TinyAlignError(f"there is no file {options.sentences}: give --sentences a text file")


def _check_out(out: Path) -> None:
    """Refuse to replace anything but an older bundle without users, or an empty folder."""
    if out.exists() and not (out / MANIFEST).is_file():
        is_empty = out.is_dir() and not any(out.iterdir())
        if not is_empty:
            raise TinyAlignError(
                f"{out} is there, is not a bundle and not empty: give another --out"
            )
    users = user_names(out / "users")
    if users:
        raise TinyAlignError(
            f"{out} holds the projectors of {', '.join(users)}: move {out / 'users'} away first"
        )


def _is_large(llm: "PreTrainedModel") -> bool:
    return input_embedding(llm).num_embeddings > LARGE_VOCABULARY


# --- loading ---


def load_sources(options: ExportOptions) -> Sources:
    """Load the models; what can be refused from small files is refused first.

    Raises:
        TinyAlignError: a model that cannot be loaded, is not supported, or does not fit the others.
    """
    encoder_folder = model_folder(options.encoder, "encoder", FAMILIES)
    llm_folder = model_folder(options.llm, "LLM", LLMS)
    tokenizer = load_tokenizer(llm_folder, options.chat_template)
    prompt = prompt_spec(tokenizer, options.instruction, options.repeat_instruction)
    encoder = load_encoder(str(encoder_folder), options.encoder_layers)
    llm = load_model(llm_folder, tokenizer)
    # Speech may produce the tokens that a projector was trained on; its file does not name them.
    if options.projector and not options.sentences and _is_large(llm):
        raise TinyAlignError(
            f"{options.projector} is a trained projector for a vocabulary of "
            f"{llm.config.vocab_size} tokens: give its training texts with --sentences, so that "
            "speech is read as their tokens only"
        )
    projector = make_projector(encoder, llm, options)
    spec = llm_spec(llm, tokenizer, options.max_context)
    # A tokenizer without any end token of the model is of another, smaller model.
    listed = listed_end_tokens(llm)
    tokens = set(tokenizer.get_vocab().values())
    if listed and not tokens.intersection(listed):
        raise TinyAlignError(
            f"{options.llm}: its model ends an answer with token {listed[0]}, its tokenizer goes "
            f"up to token {max(tokens)}: they belong to different models"
        )
    stored = GgufLlm(llm_folder).module_blocks if llm_folder.is_file() else no_blocks
    return Sources(encoder, llm, tokenizer, spec, prompt, projector, stored)


# --- writing ---


def _write(folder: Path, options: ExportOptions, sources: Sources, begin: BeginPhase) -> Manifest:
    """Write every file but the manifest, and make that, without the files' hashes."""
    encoder = sources.encoder
    projector = sources.projector
    spec = sources.llm_spec
    graphs = {}
    begin("encoder")
    graphs["encoder"] = write_encoder(folder, encoder, options.encoder_precision)
    begin("projector")
    graphs["projector"] = write_projector(folder, projector)
    graphs["llm"] = write_llm(folder, sources.llm_source(), options, begin)
    begin("tokenizer and embeddings")
    embeddings_sha256 = sha256(folder / EMBEDDINGS)
    if options.projector:
        check_binding(options.projector, embeddings_sha256)
    _write_texts(folder, options, sources)
    if options.soft_tokens:
        readout = Readout("pooled", merge_cosine=options.merge_cosine)
    else:
        table = load_table(folder).rows()
        table *= np.float32(spec.embedding_scale)  # as the LLM sees it
        readout = Readout("ctc", scale=ctc_scale(table))
    context = spec.max_context
    dims = {
        **encoder.dims,
        "tokens": (1, min(32, context), context),
        "past": (0, min(48, context), context),
    }
    return Manifest(
        name=options.name,
        front_end=encoder.front_end,
        encoder=EncoderSpec(encoder.feature_size, encoder.frame_s),
        llm=spec,
        prompt=sources.prompt,
        projector=dataclasses.asdict(projector.config),
        projector_weights=find_weights(folder / "projector.onnx", projector),
        graphs=graphs,
        dims=dims,
        embeddings_sha256=embeddings_sha256,
        readout=readout,
        files={},
        windows=_windows(folder, options, encoder, graphs["encoder"]),
        projector_trained=options.projector is not None,
    )


def _write_texts(folder: Path, options: ExportOptions, sources: Sources) -> None:
    """Write the tokenizer, the sentences and, for a large vocabulary, the speech vocabulary."""
    tokenizer = sources.tokenizer
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if options.sentences:
        shutil.copyfile(options.sentences, folder / "sentences.txt")
    if _is_large(sources.llm):
        prompt = sources.prompt.on(datetime.now())
        np.save(folder / SPEECH_TOKENS, sentence_tokens(options.sentences, tokenizer, prompt))


def sentence_tokens(
    sentences: str | None, tokenizer: "PreTrainedTokenizerFast", prompt: PromptSpec
) -> np.ndarray:
    """The tokens that occur in the sentences of a text file, encoded as in a prompt.

    Returns:
        (K,) int32, sorted; empty without a file.
    """
    tokens: set[int] = set()
    if sentences:
        for line in Path(sentences).read_text(encoding="utf-8").splitlines():
            if line.strip():
                tokens.update(encode_in_place(tokenizer.backend_tokenizer, prompt, line))
    return np.array(sorted(tokens), np.int32)


def _windows(
    folder: Path, options: ExportOptions, encoder: LayeredEncoder, spec: GraphSpec
) -> WindowSpec | None:
    """The windows of the exported encoder; None if an utterance is encoded as a whole.

    That is so if the projector pools it, or if the encoder takes one length only.
    """
    spec = spec.on(BACKEND)
    rows = spec.inputs[0]
    if options.soft_tokens or isinstance(rows.shape[1], int):
        return None
    with load_runner(folder / spec.file, spec, BACKEND) as runner:

        def encode(window: np.ndarray) -> np.ndarray:
            return runner({rows.name: window})["features"]

        return window_spec(options.window_s, encoder.front_end, encoder.frame_s, encode)


# --- graphs ---


def write_encoder(folder: Path, encoder: LayeredEncoder, precision: str) -> GraphSpec:
    """Write the encoder's graph and compare it with PyTorch in FP32, whatever the precision.

    With "int8" there is a second graph for ONNX Runtime; the weights are stored once.
    """
    graph = encoder_graph(encoder)

    def check(path: Path, spec: GraphSpec) -> parity.Differences:
        with load_runner(path, spec, BACKEND) as runner:
            return parity.encoder_parity(runner, encoder)

    if precision == "fp32":
        path = folder / "encoder.onnx"
        return _compare(path, graph.save(path), check)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "encoder.onnx"
        exact = _compare(path, graph.save(path), check)
    store_int8(graph.program)
    standard = _write_int8(folder / "encoder.onnx", graph, encoder, exact)
    multiply_int8(graph.program)
    ort = _write_int8(folder / "encoder.ort.onnx", graph, encoder, exact)
    ort = dataclasses.replace(ort, quantised_activations="dynamic")  # see int8.multiply_int8
    share_weights(folder / standard.file, folder / ort.file)
    return dataclasses.replace(standard, backends={BACKEND: ort})


def _write_int8(path: Path, graph: Graph, encoder: LayeredEncoder, exact: GraphSpec) -> GraphSpec:
    """Write a graph with INT8 products and measure its cost."""
    spec = graph.save(path)
    with load_runner(path, spec, BACKEND) as runner:
        cosines = parity.encoder_cosine(runner, encoder)
    figures = {**exact.parity, "int8_cosine_to_pytorch": cosines}
    return dataclasses.replace(spec, precision="int8", parity=figures)


def write_projector(folder: Path, projector: BridgeFormer) -> GraphSpec:
    """Write the projector's graph and compare it with PyTorch."""

    def check(path: Path, spec: GraphSpec) -> parity.Differences:
        with load_runner(path, spec, BACKEND) as runner:
            return parity.projector_parity(runner, projector)

    path = folder / "projector.onnx"
    return _compare(path, projector_graph(projector).save(path), check)


def _compare(path: Path, spec: GraphSpec, check: "CheckGraph") -> GraphSpec:
    """Compare a graph in FP32 with PyTorch; returns its specification with the differences."""
    return parity.checked(spec, check(path, spec))
