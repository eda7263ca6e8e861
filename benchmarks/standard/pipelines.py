"""The whole way from speech to text as others would build it: our pipeline with something else under it.

Front end, readout, prompt and text are the same everywhere, so that what differs is what does the work. Each is an
Assistant and lives in a process of its own (processes.py). What a peer needs beside the bundle are the reference's
weights, which lie in the source tree: such a peer measures the reference bundle only.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tiny_align.benchmarks.standard.stages import ANSWER, FIRST, PER_TOKEN
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.export.pretrained import load_pretrained
from tiny_align.runtime.assistant import Assistant, User
from tiny_align.runtime.backends.base import Decoder, Runner, Scores
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.llm import Decoding, LanguageModel
from tiny_align.runtime.machine import gpu_compute_capability

OURS = "tiny-align"
WEIGHTS = Path(__file__).parents[2] / "reference" / "weights"


class Pipeline:
    """One of PIPELINES, to be measured."""

    def __init__(self, name: str, bundle: Path, threads: int):
        self._assistant = PIPELINES[name](Bundle.open(bundle, verify=False), threads)

    def measure(self, audio: np.ndarray) -> dict:
        """Answer a recording (S,): what a person notices, and what was said."""
        answer = self._assistant.answer(audio)
        n = len(answer.tokens)
        per_token = (answer.seconds - answer.ttft_s) / (n - 1) if n > 1 else float("nan")
        seconds = {FIRST: answer.ttft_s, PER_TOKEN: per_token, ANSWER: answer.seconds}
        return {"seconds": seconds, "text": answer.text, "tokens": n}


def ours(bundle: Bundle, threads: int) -> Assistant:
    return Assistant.load(bundle, threads=threads)


def reason_against_tensorrt() -> str | None:
    """Why this machine cannot run TensorRT engines; None if it can."""
    if find_spec("tensorrt") is None:
        return "TensorRT is not installed for this Python, see `tiny-align doctor`"
    if gpu_compute_capability() is None:
        return "the CUDA driver finds no GPU"
    return None


def tensorrt(bundle: Bundle, threads: int) -> Assistant:
    if reason := reason_against_tensorrt():
        raise TinyAlignError(reason)
    return Assistant.load(bundle, backend="tensorrt", threads=threads)


# --- the cascade ---


class Cascade(Assistant):
    """The encoder's own transcript, read by the LLM as text: what there is without a projector."""

    def stream(
        self,
        audio: np.ndarray,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        *,
        user: User = None,
    ):
        began, letters = time.perf_counter(), self.transcript(audio)
        rows = (
            self.llm.embed(self.llm.encode_words(letters))
            if letters
            else np.zeros((0, 1), np.float32)
        )
        return self._events(rows, instruction, decoding, began)

    def transcript(self, audio: np.ndarray) -> str:
        """Letters of (S,) speech, no longer than a window: greedy CTC by the encoder's own head."""
        from tiny_align.reference.encoder import decode_letters

        matrix, bias = self._head
        return decode_letters(
            (self.encode_window(audio)[:, -len(matrix) :] @ matrix + bias).argmax(axis=1)
        )

    @functools.cached_property
    def _head(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the encoder's last layer, which is the last of the features."""
        from safetensors.numpy import load_file

        stored = load_file(weights(self.bundle, "encoder") / "model.safetensors")
        return stored["ctc_head.weight"][:, :, 0].T, stored["ctc_head.bias"]


def cascade(bundle: Bundle, threads: int) -> Assistant:
    return Cascade.load(bundle, threads=threads)


# --- ONNX Runtime without the LLM's own graph ---


def with_llm(
    bundle: Bundle, decoder: Decoder, threads: int, backend: str | None = "onnxruntime"
) -> Assistant:
    """Another decoder after our encoder and projector, in the form for `backend` or the plain one."""
    encoder, projector = (
        load_runner(
            bundle.graph(name, backend),
            bundle.manifest.graphs[name].on(backend),
            "onnxruntime",
            threads,
        )
        for name in ("encoder", "projector")
    )
    return Assistant(
        bundle, encoder, projector, LanguageModel(bundle, decoder), "onnxruntime", threads
    )


def plain(bundle: Bundle, threads: int) -> Assistant:
    """Keys and values go through numpy at every step."""
    decoder = PlainDecoder(bundle.graph("llm"), bundle.manifest.graphs["llm"], threads)
    return with_llm(bundle, decoder, threads, backend=None)


# --- PyTorch ---


class TorchGraph(Runner):
    """A module in the place of a graph of one input and one output."""

    def __init__(self, spec: GraphSpec, module):
        super().__init__(spec)
        self._module = module

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        (value,) = feed.values()
        return {self.spec.outputs[0].name: self._module(torch.from_numpy(value)).numpy()}


class TorchDecoder(Decoder):
    """transformers' LLM with a cache that grows."""

    def __init__(self, model):
        self._model = model

    def open_cache(self, capacity: int):
        from transformers import DynamicCache

        return DynamicCache()

    def run(self, embeddings: np.ndarray, cache, past: int) -> Scores:
        import torch

        rows = torch.from_numpy(np.ascontiguousarray(embeddings[None]))
        out = self._model(
            inputs_embeds=rows, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return Scores(out.logits[0, 0].numpy())

    def rewind(self, cache, length: int) -> None:
        cache.crop(length)


def torch_pipeline(
    bundle: Bundle, threads: int, prepare: Callable = lambda module: module
) -> Assistant:
    """Every graph by the PyTorch module it was exported from, in FP32; `prepare` may compile a module."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_align.align.model.users import load_projector
    from tiny_align.export.encoders import load_encoder
    from tiny_align.reference.build import ENCODER_LAYERS

    torch.set_num_threads(threads)
    encoder = load_encoder(str(weights(bundle, "encoder")), ENCODER_LAYERS)
    projector = load_projector(bundle, bundle.graph("projector")).eval()
    llm = load_pretrained(AutoModelForCausalLM, weights(bundle, "llm")).eval()
    for module in (encoder, projector, llm):
        module.requires_grad_(False)  # whatever the thread: a session has its own
    graphs, decoder = bundle.manifest.graphs, TorchDecoder(prepare(llm))
    runners = (
        TorchGraph(graphs["encoder"], prepare(encoder)),
        TorchGraph(graphs["projector"], prepare(projector)),
    )
    return Assistant(bundle, *runners, LanguageModel(bundle, decoder), "pytorch", threads)


def compiled(bundle: Bundle, threads: int) -> Assistant:
    import torch

    return torch_pipeline(bundle, threads, functools.partial(torch.compile, dynamic=True))


# --- llama.cpp ---


class LlamaCppDecoder(Decoder):
    """llama.cpp in the LLM's place; it holds one conversation."""

    def __init__(self, llm):
        self._llm = llm

    def open_cache(self, capacity: int):
        self._llm.rewind(0)
        return self._llm

    def run(self, embeddings: np.ndarray, cache, past: int) -> Scores:
        return Scores(cache.read(embeddings))

    def rewind(self, cache, length: int) -> None:
        cache.rewind(length)


def llama_cpp(bundle: Bundle, threads: int) -> Assistant:
    """Ours but for the LLM: the reference's weights in Q4_0."""
    from tiny_align.benchmarks.standard.peers import Llama, write_gguf
    from tiny_align.benchmarks.standard.training_cost import SHAPES

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llm.gguf"
        write_gguf(path, SHAPES["reference"], reference_weights(bundle), rope_theta=10_000.0)
        decoder = LlamaCppDecoder(Llama(path, SHAPES["reference"], threads))
    return with_llm(bundle, decoder, threads)


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def reference_weights(bundle: Bundle) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """The reference LLM's tensors by their names in a GGUF file."""
    from safetensors.numpy import load_file

    from tiny_align.benchmarks.standard.training_cost import SHAPES

    stored = load_file(weights(bundle, "llm") / "model.safetensors")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        layer, _, part = name.rpartition(".")
        place = layer.replace("blk", "model.layers") + "." if layer else ""
        values = stored[f"{place}{GGUF_NAMES[part]}.weight"].astype(np.float32)
        return (
            turned(values, SHAPES["reference"].head_size)
            if part in ("attn_q", "attn_k")
            else values
        )

    return read


def turned(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of a head's two halves -> pairs: transformers rotates the halves, llama.cpp neighbours."""
    heads = matrix.reshape(-1, 2, head_size // 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def weights(bundle: Bundle, name: str) -> Path:
    """The folder of the weights that the reference bundle is made of: "encoder" or "llm"."""
    if bundle.manifest.name != "reference":
        raise TinyAlignError(
            "the bundle's weights are not known in this form, only the reference's are"
        )
    if not (WEIGHTS / name).is_dir():
        raise TinyAlignError("the reference's weights are not here: run from the source tree")
    return WEIGHTS / name


PIPELINES: dict[str, Callable[[Bundle, int], Assistant]] = {
    OURS: ours,
    "cascade, by our runtime": cascade,
    "ONNX Runtime, plain graphs": plain,
    "PyTorch, eager": torch_pipeline,
    "PyTorch, compiled": compiled,
    "LLM by llama.cpp": llama_cpp,
    "TensorRT": tensorrt,
}
LEFT_OUT = {  # peer -> why the whole way cannot be built on it
    "onnxruntime-genai": "takes no embeddings; its LLM alone is in `python -m tiny_align.benchmarks.studies.llm`",
}
