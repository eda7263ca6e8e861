"""The whole way from speech to text as others would build it: our pipeline with something else under it.

Front end, readout, prompt and text are the same everywhere, so that what differs is what does the work. Each is an
Assistant and lives in a process of its own (processes.py). What a peer needs beside the bundle are the reference's
weights, which lie in the source tree: such a peer measures the reference bundle only.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiny_align.benchmarks.stages import ANSWER, FIRST, PER_TOKEN
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backend import Loaded, load_runner
from tiny_align.runtime.bundle import Bundle
from tiny_align.runtime.errors import TinyAlignError

OURS = "tiny-align"
WEIGHTS = Path(__file__).parents[1] / "reference" / "weights"


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


def tensorrt(bundle: Bundle, threads: int) -> Assistant:
    return Assistant.load(bundle, backend="tensorrt", threads=threads)


# --- the cascade ---


class Cascade(Assistant):
    """The encoder's own transcript, read by the LLM as text: what there is without a projector."""

    def soft_tokens(self, features: np.ndarray) -> np.ndarray:
        from safetensors.numpy import load_file

        from tiny_align.reference.encoder import decode_letters

        if not hasattr(self, "_head"):
            stored = load_file(weights(self.bundle, "encoder") / "model.safetensors")
            self._head = stored["ctc_head.weight"][:, :, 0].T, stored["ctc_head.bias"]
        matrix, bias = self._head
        letters = decode_letters((features[:, -len(matrix) :] @ matrix + bias).argmax(axis=1))  # the last layer's
        return self.llm.embed(self.llm.encode_words(letters) if letters else [])


def cascade(bundle: Bundle, threads: int) -> Assistant:
    return Cascade.load(bundle, threads=threads)


# --- ONNX Runtime without the LLM's own graph ---


class PlainDecoder(Loaded):
    """The LLM's plain graph as anybody runs it: keys and values go through numpy at every step."""

    def __init__(self, bundle: Bundle, threads: int):
        spec = bundle.manifest.graphs["llm"]
        self._run, self._spec = load_runner(bundle.graph("llm"), spec, "onnxruntime", threads), spec

    def open_cache(self, capacity: int) -> dict[str, np.ndarray]:
        empty = {t.name: [0 if isinstance(size, str) else size for size in t.shape] for t in self._spec.inputs[1:]}
        return {name: np.zeros(shape, np.float32) for name, shape in empty.items()}

    def read(self, embeddings: np.ndarray, cache: dict[str, np.ndarray], past: int) -> np.ndarray:
        out = self._run({"inputs_embeds": embeddings[None], **cache})
        present = [out[t.name] for t in self._spec.outputs[1:]]
        cache.update(zip(cache, present, strict=True))
        return out[self._spec.outputs[0].name][0, -1]


def with_llm(bundle: Bundle, decoder: Loaded, threads: int, backend: str | None = "onnxruntime") -> Assistant:
    """Another decoder after our encoder and projector, in the form for `backend` or the plain one."""
    encoder, projector = (
        load_runner(bundle.graph(name, backend), bundle.manifest.graphs[name].on(backend), "onnxruntime", threads)
        for name in ("encoder", "projector")
    )
    return Assistant(bundle, encoder, projector, decoder, "onnxruntime", threads)


def plain(bundle: Bundle, threads: int) -> Assistant:
    return with_llm(bundle, PlainDecoder(bundle, threads), threads, backend=None)


# --- PyTorch ---


class TorchGraph(Loaded):
    """A module in the place of a graph of one input and one output."""

    def __init__(self, module, output: str):
        self._module, self._output = module, output

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        (value,) = feed.values()
        return {self._output: self._module(torch.from_numpy(value)).numpy()}


class TorchDecoder(Loaded):
    """transformers' LLM with a cache that grows."""

    def __init__(self, model):
        self._model = model

    def open_cache(self, capacity: int):
        from transformers import DynamicCache

        return DynamicCache()

    def read(self, embeddings: np.ndarray, cache, past: int) -> np.ndarray:
        import torch

        rows = torch.from_numpy(np.ascontiguousarray(embeddings[None]))
        return (
            self._model(inputs_embeds=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[0, 0]
            .numpy()
        )


def torch_pipeline(bundle: Bundle, threads: int, prepare: Callable = lambda module: module) -> Assistant:
    """Every graph by the PyTorch module it was exported from, in FP32; `prepare` may compile a module."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_align.align.users import load_projector
    from tiny_align.export.encoders import load_encoder
    from tiny_align.reference.build import ENCODER_LAYERS

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    encoder = load_encoder(str(weights(bundle, "encoder")), ENCODER_LAYERS)
    projector = load_projector(bundle, bundle.graph("projector")).eval()
    llm = AutoModelForCausalLM.from_pretrained(weights(bundle, "llm")).eval()
    return Assistant(
        bundle,
        TorchGraph(prepare(encoder), "features"),
        TorchGraph(prepare(projector), "soft_tokens"),
        TorchDecoder(prepare(llm)),
        "pytorch",
        threads,
    )


def compiled(bundle: Bundle, threads: int) -> Assistant:
    import torch

    return torch_pipeline(bundle, threads, functools.partial(torch.compile, dynamic=True))


# --- llama.cpp ---


class LlamaCppDecoder(Loaded):
    """llama.cpp in the LLM's place; it holds one conversation."""

    def __init__(self, llm):
        self._llm = llm

    def open_cache(self, capacity: int) -> None:
        self._llm.forget()
        return self

    def read(self, embeddings: np.ndarray, cache, past: int) -> np.ndarray:
        return self._llm.read(embeddings)


def llama_cpp(bundle: Bundle, threads: int) -> Assistant:
    """Ours but for the LLM: the reference's weights in Q4_0."""
    import tempfile

    from tiny_align.benchmarks.peers import Llama, write_gguf
    from tiny_align.benchmarks.training_cost import SHAPES

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

    from tiny_align.benchmarks.training_cost import SHAPES

    stored = load_file(weights(bundle, "llm") / "model.safetensors")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        layer, _, part = name.rpartition(".")
        place = layer.replace("blk", "model.layers") + "." if layer else ""
        values = stored[f"{place}{GGUF_NAMES[part]}.weight"].astype(np.float32)
        return turned(values, SHAPES["reference"].head_size) if part in ("attn_q", "attn_k") else values

    return read


def turned(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of a head's two halves -> pairs: transformers rotates the halves, llama.cpp neighbours."""
    heads = matrix.reshape(-1, 2, head_size // 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def weights(bundle: Bundle, name: str) -> Path:
    """The folder of the weights that the reference bundle is made of: "encoder" or "llm"."""
    if bundle.manifest.name != "reference":
        raise TinyAlignError("the bundle's weights are not known in this form, only the reference's are")
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
    "onnxruntime-genai": "takes no embeddings; its LLM alone is in `python -m tiny_align.benchmarks.llm`",
}
