"""Writes a bundle: loads the models, exports, quantises, checks parity, and puts every file in its place.

Models come from local folders or hub ids, as transformers' `from_pretrained` takes them.
"""

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tiny_align.export import parity
from tiny_align.export.encoders import encoder_graph, load_encoder
from tiny_align.export.graphs import kv_shape, llm_graph, projector_graph
from tiny_align.export.pretrained import load_pretrained
from tiny_align.export.quantise import quantise_int4
from tiny_align.runtime.backend import load_runner
from tiny_align.runtime.bundle import (
    MANIFEST,
    USER_RECORD,
    EncoderSpec,
    GraphSpec,
    LlmSpec,
    Manifest,
    PromptSpec,
    WeightSpec,
    write_manifest,
)  # fmt: skip
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import sha256, written_folder
from tiny_align.runtime.readout import Readout, ctc_scale

LLMS = ("llama",)


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle; paths are local folders or hub ids."""

    encoder: str
    llm: str
    encoder_layers: tuple[int, ...] = (-1,)  # hidden states that make the features; -1 is the last layer's
    sentences: str | None = None  # a text file: what a person may be asked to read, one sentence per line
    projector: str | None = None  # a safetensors file; None: an untrained one
    precision: str = "int4"  # of the LLM: "int4" or "fp32"
    name: str = "bundle"
    instruction: str = "Answer the user."
    repeat_instruction: str = "Repeat what the user says."
    max_context: int = 256
    soft_tokens: int | None = None  # the projector pools to so many; None: length follows the speech
    merge_cosine: float | None = 0.85  # where it pools, see runtime/readout.py
    seed: int = 0


def export_bundle(options: ExportOptions, out: Path) -> Manifest:
    """Export everything to `out`, which appears whole or not at all; a bundle without persons is replaced.

    Raises:
        TinyAlignError: a model that cannot be loaded or is of no supported architecture, a graph that differs
            from PyTorch by more than parity.TOLERANCE, or an `out` with something else in it.
    """
    _check_sizes(options)
    _check_out(Path(out))
    encoder, front_end = load_encoder(options.encoder, options.encoder_layers)
    llm, tokenizer = load_llm(options.llm)
    projector = make_projector(encoder, llm, options)
    prompt = prompt_spec(tokenizer, options)  # refuses a template that cannot be cut, before the long part
    with written_folder(Path(out)) as folder:
        manifest = _write(folder, options, encoder, front_end, llm, tokenizer, projector, prompt)
        return write_manifest(folder, manifest)


def _check_out(out: Path) -> None:
    """What is written to `out` replaces what is there: that may only be an older bundle."""
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise TinyAlignError(f"{out} is there, is not a bundle and not empty: give another --out")
    if users := sorted(p.parent.name for p in out.glob(f"users/*/{USER_RECORD}")):
        raise TinyAlignError(f"{out} holds the projectors of {', '.join(users)}: move {out / 'users'} away first")


def _check_sizes(options: ExportOptions) -> None:
    for name, least in (("max_context", 32), ("soft_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise TinyAlignError(f"--{name.replace('_', '-')} is {value}: give at least {least}")


def _write(folder: Path, options, encoder, front_end, llm, tokenizer, projector, prompt) -> Manifest:
    graphs = {
        "encoder": _write_graph(folder, "encoder", encoder_graph(encoder), parity.encoder_parity, encoder),
        "projector": _write_graph(folder, "projector", projector_graph(projector), parity.projector_parity, projector),
        "llm": _write_llm(folder, llm, options.precision),
    }
    table = llm.get_input_embeddings().weight.detach().numpy().astype(np.float16)
    np.save(folder / "token_embeddings.npy", table)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if options.sentences:
        shutil.copyfile(options.sentences, folder / "sentences.txt")
    llm_sizes = llm_spec(llm, tokenizer, options.max_context)
    context = llm_sizes.max_context
    return Manifest(
        name=options.name,
        front_end=front_end,
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
        embeddings_sha256=sha256(folder / "token_embeddings.npy"),
        readout=make_readout(options, table),
        files={},
    )


def _write_graph(folder: Path, name: str, graph, check, module) -> GraphSpec:
    spec = graph.save(folder / f"{name}.onnx")
    with load_runner(folder / spec.file, spec, "onnxruntime") as runner:
        figures = check(runner, module)
    _hold(name, figures)
    return dataclasses.replace(spec, parity={"max_abs_diff_to_pytorch": figures})


def _hold(name: str, figures: dict[str, float]) -> None:
    worst = np.max(list(figures.values()))  # NaN if any is
    if not worst < parity.TOLERANCE:
        raise TinyAlignError(
            f"the exported {name} differs from PyTorch by {worst:.2g}, allowed is {parity.TOLERANCE}: "
            f"by length {figures}. Nothing was written; report the model and the versions of torch and transformers"
        )


def _write_llm(folder: Path, llm, precision: str) -> GraphSpec:
    """The FP32 graph is checked in any case; in the bundle goes what `precision` says."""
    if precision == "fp32":
        return _write_graph(folder, "llm", llm_graph(llm), parity.llm_parity, llm)
    with tempfile.TemporaryDirectory() as temporary:
        exact = _write_graph(Path(temporary), "llm", llm_graph(llm), parity.llm_parity, llm)
        quantise_int4(Path(temporary) / exact.file, folder / exact.file)
    spec = dataclasses.replace(exact, precision=precision)
    with load_runner(folder / spec.file, spec, "onnxruntime") as runner:
        cost = parity.llm_parity(runner, llm)
    fp32 = exact.parity["max_abs_diff_to_pytorch"]
    return dataclasses.replace(spec, parity={"max_abs_diff_to_pytorch": fp32, "int4_max_abs_diff_to_pytorch": cost})


def find_weights(graph: Path, projector) -> tuple[WeightSpec, ...]:
    """Where each projector parameter lies in the graph's data file, found by its values.

    Raises:
        TinyAlignError: the exporter has changed or merged a parameter, so that it could not be replaced.
    """
    places = {}
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if not (entry := {e.key: e.value for e in tensor.external_data}):
            continue  # a shape or a scalar, kept in the graph
        places[tensor.name] = (int(entry.get("offset", 0)), int(entry["length"]), tuple(tensor.dims), tensor.data_type)
    blob = (graph.parent / f"{graph.name}.data").read_bytes()
    return tuple(_find(name, value.detach().numpy(), places, blob) for name, value in projector.state_dict().items())


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


def load_llm(path: str):
    """The LLM in FP32 and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = load_pretrained(AutoConfig, path)
    if config.model_type not in LLMS:
        raise TinyAlignError(f"{path} is a {config.model_type!r}; supported LLMs: {', '.join(LLMS)}")
    return load_pretrained(AutoModelForCausalLM, path, dtype=torch.float32).eval(), load_pretrained(AutoTokenizer, path)


def make_projector(encoder, llm, options: ExportOptions):
    """A projector between the two, with the weights of `options.projector` or random ones."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tiny_align.align.projector import build_projector

    torch.manual_seed(options.seed)
    sizes = {"feature_size": encoder.feature_size, "embedding_size": llm.config.hidden_size}
    projector = build_projector({**sizes, "soft_tokens": options.soft_tokens, "kind": "bridgeformer"}).eval()
    if options.projector:
        try:
            projector.load_state_dict(load_file(options.projector))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TinyAlignError(f"{options.projector} is no projector for this encoder and LLM: {error}") from error
    else:
        for value in projector.parameters():  # no two parameters alike, so that each is found in the graph
            value.data += torch.randn_like(value) * 1e-4
    return projector


def make_readout(options: ExportOptions, table: np.ndarray) -> Readout:
    if options.soft_tokens:
        return Readout("pooled", merge_cosine=options.merge_cosine)
    return Readout("ctc", scale=ctc_scale(table))


def llm_spec(llm, tokenizer, max_context: int) -> LlmSpec:
    heads, size = kv_shape(llm.config)
    ends = (
        llm.generation_config.eos_token_id if llm.generation_config.eos_token_id is not None else tokenizer.eos_token_id
    )
    return LlmSpec(
        vocabulary=llm.config.vocab_size,
        hidden_size=llm.config.hidden_size,
        n_layers=llm.config.num_hidden_layers,
        n_kv_heads=heads,
        head_size=size,
        end_tokens=tuple(ends if isinstance(ends, list) else [ends]),
        max_context=min(max_context, llm.config.max_position_embeddings),
    )


def prompt_spec(tokenizer, options: ExportOptions) -> PromptSpec:
    """The chat template, rendered with marks in its two holes and cut there."""
    marks = ("INSTRUCTION-GOES-HERE", "SPEECH-GOES-HERE")
    messages = [{"role": "system", "content": marks[0]}, {"role": "user", "content": marks[1]}]
    if not tokenizer.chat_template:
        raise TinyAlignError("the LLM's tokenizer has no chat template: use an instruction-tuned model")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if any(text.count(mark) != 1 for mark in marks):
        raise TinyAlignError("the LLM's chat template does not take one system and one user message: it cannot be cut")
    before, rest = text.split(marks[0])
    between, after = rest.split(marks[1])
    return PromptSpec(before, between, after, options.instruction, options.repeat_instruction)
