"""Writes a bundle: loads the models, exports, quantises, checks parity, and puts every file in its place.

Models come from local folders or hub ids, as transformers' `from_pretrained` takes them.
"""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import onnx

from tiny_align.export import parity
from tiny_align.export.encoders import FAMILIES, encoder_graph, load_encoder
from tiny_align.export.graphs import projector_graph
from tiny_align.export.int8 import multiply_int8, store_int8
from tiny_align.export.llm_ort import llm_ort_graph
from tiny_align.export.llms import (
    LLMS,
    embedding_table,
    llm_graph,
    llm_spec,
    load_model,
    load_tokenizer,
)
from tiny_align.export.model_folder import model_folder
from tiny_align.export.packing import share_weights
from tiny_align.export.pretrained import refuse_not_finite
from tiny_align.export.prompts import prompt_spec
from tiny_align.export.quantise import BLOCKS, forms, quantise
from tiny_align.export.topk import add_topk
from tiny_align.export.windows import MARGIN_S, window_spec
from tiny_align.runtime import checks
from tiny_align.runtime.backends.base import load_decoder, load_runner
from tiny_align.runtime.bundle.bundle import SPEECH_TOKENS
from tiny_align.runtime.bundle.manifest import (
    MANIFEST,
    EncoderSpec,
    GraphSpec,
    Manifest,
    WeightSpec,
    write_manifest,
)
from tiny_align.runtime.bundle.users import USER_RECORD  # fmt: skip
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import sha256, write_errors, written_folder
from tiny_align.runtime.llm import encode_in_place
from tiny_align.runtime.readout import Readout, ctc_scale
from tiny_align.runtime.windows import WindowSpec

LARGE_VOCABULARY = (
    8192  # rows of the embedding table; of a larger one speech is read as listed tokens only
)
UNTRAINED = "Leave --projector out and train one with `tiny-align align --general`"


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle; paths are local folders or hub ids."""

    encoder: str
    llm: str
    encoder_precision: str = "fp32"  # or "int8": weights, and on ONNX Runtime products
    encoder_layers: tuple[int, ...] = (
        -1,
    )  # hidden states of the features, the shortcut's first; -1: the last layer's
    sentences: str | None = (
        None  # a text file: what a person may be asked to read and may say, a sentence per line
    )
    chat_template: str | None = (
        None  # the name of one of the LLM's, or a file; None: its default or only fitting one
    )
    projector: str | None = None  # a safetensors file; None: an untrained one
    precision: str = "int4"  # of the LLM's weights: see quantise.BITS
    head_precision: str | None = (
        None  # of its output layer; None: "int8" with "int4", else the layers'
    )
    block_size: int = BLOCKS[0]  # weights in integers that share a scale
    name: str = "bundle"
    instruction: str = "Answer the user."
    repeat_instruction: str = "Repeat what the user says."
    max_context: int = 256
    soft_tokens: int | None = (
        None  # the projector pools to so many; None: length follows the speech
    )
    merge_cosine: float | None = 0.85  # where it pools, see runtime/readout.py
    window_s: float = (
        3.84  # speech is encoded in windows of so many seconds while it is spoken; 0: as a whole
    )
    seed: int = 0


def export_bundle(options: ExportOptions, out: Path) -> Manifest:
    """Export everything to `out`, which appears whole or not at all; a bundle without persons is replaced.

    Raises:
        TinyAlignError: a model that cannot be loaded or is of no supported architecture, a graph that differs
            from PyTorch by more than parity.TOLERANCE, or an `out` with something else in it.
    """
    _check_sizes(options)
    forms(options.precision, options.head_precision, options.block_size)
    _check_out(Path(out))
    if options.sentences and not Path(options.sentences).is_file():
        raise TinyAlignError(f"there is no file {options.sentences}: give --sentences a text file")
    encoder_folder = model_folder(options.encoder, "encoder", FAMILIES)
    llm_folder = model_folder(options.llm, "LLM", LLMS)
    tokenizer = load_tokenizer(llm_folder, options.chat_template)
    prompt = prompt_spec(
        tokenizer, options.instruction, options.repeat_instruction
    )  # refuses before the long part
    encoder = load_encoder(str(encoder_folder), options.encoder_layers)
    llm = load_model(llm_folder, tokenizer)
    _check_words(options, llm)
    projector = make_projector(encoder, llm, options)
    sizes = llm_spec(llm, tokenizer, options.max_context)
    _check_ends(options.llm, llm, tokenizer)
    with write_errors(Path(out)), written_folder(Path(out)) as folder:
        manifest = _write(folder, options, encoder, llm, sizes, tokenizer, projector, prompt)
        return write_manifest(folder, manifest)


def _check_out(out: Path) -> None:
    """What is written to `out` replaces what is there: that may only be an older bundle."""
    if (
        out.exists()
        and not (out / MANIFEST).is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise TinyAlignError(f"{out} is there, is not a bundle and not empty: give another --out")
    if users := sorted(p.parent.name for p in out.glob(f"users/*/{USER_RECORD}")):
        raise TinyAlignError(
            f"{out} holds the projectors of {', '.join(users)}: move {out / 'users'} away first"
        )


def _check_sizes(options: ExportOptions) -> None:
    for name in ("max_context", "soft_tokens", "window_s"):
        checks.check(name, getattr(options, name), f"--{name.replace('_', '-')}")
    if 0 < options.window_s < 3 * MARGIN_S:
        raise TinyAlignError(
            f"--window-s is {options.window_s}: give at least {3 * MARGIN_S:g}, or 0 for no windows"
        )


def _check_ends(path: str, llm, tokenizer) -> None:
    """A tokenizer that knows no token which the model ends with is a smaller one, of another model."""
    listed = llm.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    if listed != [None] and not set(listed) & set(tokenizer.get_vocab().values()):
        raise TinyAlignError(
            f"{path}: its model ends an answer with token {listed[0]}, its tokenizer goes up to token "
            f"{max(tokenizer.get_vocab().values())}: they belong to different models"
        )


def _check_words(options: ExportOptions, llm) -> None:
    """A trained projector may say what it was trained on; of a large vocabulary somebody must say what that was."""
    if options.projector and not options.sentences and _is_large(llm):
        raise TinyAlignError(
            f"{options.projector} is a trained projector for a vocabulary of {llm.config.vocab_size} tokens: give its "
            "training texts with --sentences, so that speech is read as their tokens only"
        )


def _is_large(llm) -> bool:
    return len(llm.get_input_embeddings().weight) > LARGE_VOCABULARY


def _write(
    folder: Path, options, encoder, llm, llm_sizes, tokenizer, projector, prompt
) -> Manifest:
    graphs = {
        "encoder": write_encoder(folder, encoder, options.encoder_precision),
        "projector": _write_graph(
            folder, "projector", projector_graph(projector), parity.projector_parity, projector
        ),
        "llm": _write_llm(folder, llm, options, llm_sizes.max_context),
    }
    table = embedding_table(llm)
    np.save(folder / "token_embeddings.npy", table)
    bound_to = sha256(folder / "token_embeddings.npy")
    _check_binding(options.projector, bound_to)
    (folder / "tokenizer.json").write_text(
        tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8"
    )
    if options.sentences:
        shutil.copyfile(options.sentences, folder / "sentences.txt")
    if _is_large(llm):
        np.save(
            folder / SPEECH_TOKENS,
            _tokens_of(options.sentences, tokenizer, prompt.on(datetime.now())),
        )
    context = llm_sizes.max_context
    return Manifest(
        name=options.name,
        front_end=encoder.front_end,
        encoder=EncoderSpec(encoder.feature_size, encoder.frame_s),
        llm=llm_sizes,
        prompt=prompt,
        projector=dataclasses.asdict(projector.config),
        projector_weights=find_weights(folder / "projector.onnx", projector),
        graphs=graphs,
        dims={
            **encoder.dims,
            "tokens": (1, min(32, context), context),
            "past": (0, min(48, context), context),
        },
        embeddings_sha256=bound_to,
        readout=make_readout(options, table.astype(np.float32) * llm_sizes.embedding_scale),
        files={},
        windows=_windows(folder, options, encoder, graphs["encoder"]),
        projector_trained=options.projector is not None,
    )


def _windows(folder: Path, options: ExportOptions, encoder, spec: GraphSpec) -> WindowSpec | None:
    """None where an utterance is looked at as a whole: the projector pools it, or the encoder takes one length only."""
    spec = spec.on("onnxruntime")
    rows = spec.inputs[0]
    if options.soft_tokens or isinstance(rows.shape[1], int):
        return None
    with load_runner(folder / spec.file, spec, "onnxruntime") as runner:
        encode = lambda given: runner({rows.name: given})["features"]  # noqa: E731
        return window_spec(options.window_s, encoder.front_end, encoder.frame_s, encode)


def _tokens_of(sentences: str | None, tokenizer, prompt) -> np.ndarray:
    """(K,) int32: the tokens that occur in the sentences of a text file, as they stand in a prompt; none of no file."""
    lines = Path(sentences).read_text(encoding="utf-8").splitlines() if sentences else []
    ids = (
        encode_in_place(tokenizer.backend_tokenizer, prompt, line) for line in lines if line.strip()
    )
    return np.array(sorted({token for line in ids for token in line}), np.int32)


def _write_graph(folder: Path, name: str, graph, check, module) -> GraphSpec:
    spec = graph.save(folder / f"{name}.onnx")
    with load_runner(folder / spec.file, spec, "onnxruntime") as runner:
        figures = check(runner, module)
    _hold(name, figures)
    return dataclasses.replace(spec, parity={"max_abs_diff_to_pytorch": figures})


def write_encoder(folder: Path, encoder, precision: str) -> GraphSpec:
    """Its graph; with "int8" a second one for ONNX Runtime, the weights stored once. FP32 is checked in any case."""
    graph = encoder_graph(encoder)
    if precision == "fp32":
        return _write_graph(folder, "encoder", graph, parity.encoder_parity, encoder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        exact = _write_graph(Path(temporary), "encoder", graph, parity.encoder_parity, encoder)
    specs = []
    for name, rewrite in (("encoder", store_int8), ("encoder.ort", multiply_int8)):
        rewrite(graph.program)
        spec = graph.save(folder / f"{name}.onnx")
        with load_runner(folder / spec.file, spec, "onnxruntime") as runner:
            cost = {"int8_cosine_to_pytorch": parity.encoder_cosine(runner, encoder)}
        specs.append(
            dataclasses.replace(spec, precision=precision, parity={**exact.parity, **cost})
        )
    plain, ort = specs
    share_weights(folder / plain.file, folder / ort.file)
    return dataclasses.replace(plain, backends={"onnxruntime": ort})


def _hold(name: str, figures: dict[str, float]) -> None:
    worst = np.max(list(figures.values()))  # NaN if any is
    if not worst < parity.TOLERANCE:
        raise TinyAlignError(
            f"the exported {name} differs from PyTorch by {worst:.2g}, allowed is {parity.TOLERANCE}: "
            f"by length {figures}. Nothing was written; report the model and the versions of torch and transformers"
        )


def _write_llm(folder: Path, llm, options: ExportOptions, max_context: int) -> GraphSpec:
    """The plain graph and the one for ONNX Runtime, their weights stored once.

    Both are checked in FP32 in any case; in the bundle goes what the options say.
    """
    lengths = parity.llm_lengths(llm.config, max_context)
    plain = functools.partial(_checked, load_runner, parity.llm_parity, llm, lengths)
    fused = functools.partial(_checked, load_decoder, parity.decoder_parity, llm, lengths)
    layers, head = forms(options.precision, options.head_precision, options.block_size)
    specs = {}
    for name, trace, check in (("llm", llm_graph, plain), ("llm.ort", llm_ort_graph, fused)):
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as temporary:  # on the disk that must have room anyway
            source = Path(temporary) / f"{name}.onnx"
            exact = trace(llm).save(source)
            figures = {"max_abs_diff_to_pytorch": check(source, exact)}
            _hold(name, figures["max_abs_diff_to_pytorch"])
            if layers.bits == head.bits == 32:
                for path in (source, source.with_name(f"{source.name}.data")):
                    path.replace(folder / path.name)
            else:
                quantise(source, folder / source.name, layers, head)
                figures[f"{options.precision}_max_abs_diff_to_pytorch"] = check(
                    folder / source.name, exact
                )
        specs[name] = dataclasses.replace(exact, precision=options.precision, parity=figures)
    specs["llm"] = add_topk(folder / specs["llm"].file, specs["llm"])
    share_weights(folder / specs["llm"].file, folder / specs["llm.ort"].file)
    return dataclasses.replace(specs["llm"], backends={"onnxruntime": specs["llm.ort"]})


def _checked(load, check, llm, lengths, path: Path, spec: GraphSpec) -> dict[str, float]:
    with load(path, spec, "onnxruntime") as loaded:
        return check(loaded, llm, lengths=lengths)


def find_weights(graph: Path, projector) -> tuple[WeightSpec, ...]:
    """Where each projector parameter lies in the graph's data file, found by its values.

    Raises:
        TinyAlignError: the exporter has changed or merged a parameter, so that it could not be replaced.
    """
    places = {}
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if not (entry := {e.key: e.value for e in tensor.external_data}):
            continue  # a shape or a scalar, kept in the graph
        places[tensor.name] = (
            int(entry.get("offset", 0)),
            int(entry["length"]),
            tuple(tensor.dims),
            tensor.data_type,
        )
    blob = (graph.parent / f"{graph.name}.data").read_bytes()
    return tuple(
        _find(name, value.detach().numpy(), places, blob)
        for name, value in projector.state_dict().items()
    )


def _find(name: str, value: np.ndarray, places: dict, blob: bytes) -> WeightSpec:
    for offset, length, shape, kind in places.values():
        if kind != onnx.TensorProto.FLOAT or length != value.nbytes:
            continue
        stored = np.frombuffer(blob, "<f4", count=value.size, offset=offset).reshape(shape)
        for transposed in (False, True):
            if np.array_equal(stored, value.T if transposed else value):
                return WeightSpec(name, offset, shape, transposed)
    raise TinyAlignError(
        f"the projector's {name} is not in the exported graph as it is: its weights could not be replaced"
    )


def make_projector(encoder, llm, options: ExportOptions):
    """A projector between the two, with the weights of `options.projector` or random ones."""
    import torch

    from tiny_align.align.model.projector import build_projector

    torch.manual_seed(options.seed)
    sizes = {"feature_size": encoder.feature_size, "embedding_size": llm.config.hidden_size}
    sizes |= {"soft_tokens": options.soft_tokens, "shortcut_size": encoder.config.hidden_size}
    projector = build_projector({**sizes, "kind": "bridgeformer"}).eval()
    if options.projector:
        projector.load_state_dict(_fitting_weights(options.projector, projector.state_dict()))
    else:
        for (
            value
        ) in projector.parameters():  # no two parameters alike, so that each is found in the graph
            value.data += torch.randn_like(value) * 1e-4
    return projector


def _fitting_weights(path: str, wanted: dict) -> dict:
    """The tensors of a safetensors file, which must have the names and sizes of those `wanted`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TinyAlignError(f"{path} is no projector for this encoder and LLM: {error}") from error
    for name in sorted(wanted.keys() | weights.keys()):
        there, needed = (list(w[name].shape) if name in w else "absent" for w in (weights, wanted))
        if there != needed:
            raise TinyAlignError(
                f"{path} is no projector for this encoder and LLM: its {name} is {there}, needed is {needed}. "
                f"{UNTRAINED}"
            )
    refuse_not_finite(path, weights)
    return weights


def _check_binding(path: str | None, embeddings_sha256: str) -> None:
    """A projector's file may say which embedding table it was trained for; sizes alone do not tell."""
    from safetensors import safe_open

    with safe_open(path, "pt") if path else contextlib.nullcontext() as file:
        bound_to = ((file and file.metadata()) or {}).get("embeddings_sha256", embeddings_sha256)
    if bound_to != embeddings_sha256:
        raise TinyAlignError(
            f"{path} was trained for another LLM (embeddings {bound_to[:12]}, this one has {embeddings_sha256[:12]}). "
            f"{UNTRAINED}"
        )


def make_readout(options: ExportOptions, table: np.ndarray) -> Readout:
    """How the projector's output is read; table (V, D) as the LLM sees it."""
    if options.soft_tokens:
        return Readout("pooled", merge_cosine=options.merge_cosine)
    return Readout("ctc", scale=ctc_scale(table))
