"""From speech to text as others would build it: our pipeline with another engine under it.

Front end, readout, prompt and text are the same in all of them; only what executes the graphs
differs. Each pipeline is an Assistant and lives in a process of its own (processes.py). Some need
the reference's weights beside the bundle. These lie in the source tree, so such a pipeline measures
the reference bundle only.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import torch

    from tiny_align.benchmarks.standard.peers import Llama, TensorSource

OURS = "tiny-align"
WEIGHTS = Path(__file__).parents[2] / "reference" / "weights"


class Pipeline:
    """One of PIPELINES, to be measured."""

    def __init__(self, name: str, bundle: Path, threads: int):
        self._assistant = PIPELINES[name](Bundle.open(bundle, verify=False), threads)

    def measure(self, audio: np.ndarray) -> dict[str, Any]:
        """Answer a recording (S,): the seconds that a user notices, and the text."""
        answer = self._assistant.answer(audio)
        n = len(answer.tokens)
        per_token = (answer.seconds - answer.ttft_s) / (n - 1) if n > 1 else float("nan")
        seconds = {FIRST: answer.ttft_s, PER_TOKEN: per_token, ANSWER: answer.seconds}
        return {"seconds": seconds, "text": answer.text, "tokens": n}


def ours(bundle: Bundle, threads: int) -> Assistant:
    return Assistant.load(bundle, threads=threads)


def tensorrt_problem() -> str | None:
    """Why this machine cannot run TensorRT engines; None if it can."""
    if find_spec("tensorrt") is None:
        return "TensorRT is not installed for this Python, see `tiny-align doctor`"
    if gpu_compute_capability() is None:
        return "the CUDA driver finds no GPU"
    return None


def tensorrt(bundle: Bundle, threads: int) -> Assistant:
    problem = tensorrt_problem()
    if problem:
        raise TinyAlignError(problem)
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
        began = time.perf_counter()
        letters = self.transcript(audio)
        rows = np.zeros((0, 1), np.float32)
        if letters:
            rows = self.llm.embed(self.llm.encode_words(letters))
        return self._events(rows, instruction, decoding, began)

    def transcript(self, audio: np.ndarray) -> str:
        """Letters of (S,) speech, no longer than a window: greedy CTC by the encoder's own head."""
        from tiny_align.reference.encoder import decode_letters

        matrix, bias = self._ctc_head
        last_layer = self.encode_window(audio)[:, -len(matrix) :]  # it is the last of the features
        return decode_letters((last_layer @ matrix + bias).argmax(axis=1))

    @functools.cached_property
    def _ctc_head(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and bias, from the encoder's last layer to the logits of letters."""
        from safetensors.numpy import load_file

        stored = load_file(weights_folder(self.bundle, "encoder") / "model.safetensors")
        return stored["ctc_head.weight"][:, :, 0].T, stored["ctc_head.bias"]


def cascade(bundle: Bundle, threads: int) -> Assistant:
    return Cascade.load(bundle, threads=threads)


# --- ONNX Runtime without the LLM's own graph ---


def with_llm(
    bundle: Bundle, decoder: Decoder, threads: int, backend: str | None = "onnxruntime"
) -> Assistant:
    """Another decoder after our encoder and projector.

    Args:
        backend: whose form of the two graphs is run; None: the plain one.
    """
    runners = []
    for name in ("encoder", "projector"):
        spec = bundle.manifest.graphs[name].on(backend)
        runners.append(load_runner(bundle.graph(name, backend), spec, "onnxruntime", threads))
    llm = LanguageModel(bundle, decoder)
    return Assistant(bundle, *runners, llm, "onnxruntime", threads)


def plain_graphs(bundle: Bundle, threads: int) -> Assistant:
    """Keys and values go through numpy at every step."""
    decoder = PlainDecoder(bundle.graph("llm"), bundle.manifest.graphs["llm"], threads)
    return with_llm(bundle, decoder, threads, backend=None)


# --- PyTorch ---


class TorchGraph(Runner):
    """A PyTorch module in the place of a graph of one input and one output."""

    def __init__(self, spec: GraphSpec, module: "torch.nn.Module"):
        super().__init__(spec)
        self._module = module

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        (value,) = feed.values()
        return {self.spec.outputs[0].name: self._module(torch.from_numpy(value)).numpy()}


class TorchDecoder(Decoder):
    """transformers' LLM with a cache that grows."""

    def __init__(self, model: "torch.nn.Module"):
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


def torch_eager(bundle: Bundle, threads: int) -> Assistant:
    return torch_modules(bundle, threads, lambda module: module)


def torch_compiled(bundle: Bundle, threads: int) -> Assistant:
    import torch

    return torch_modules(bundle, threads, functools.partial(torch.compile, dynamic=True))


def torch_modules(bundle: Bundle, threads: int, prepare: Callable) -> Assistant:
    """Every graph by the PyTorch module it was exported from, in FP32; `prepare` may compile it."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_align.align.model.users import load_projector
    from tiny_align.export.encoders import load_encoder
    from tiny_align.reference.build import ENCODER_LAYERS

    torch.set_num_threads(threads)
    encoder = load_encoder(str(weights_folder(bundle, "encoder")), ENCODER_LAYERS)
    projector = load_projector(bundle, bundle.graph("projector")).eval()
    llm = load_pretrained(AutoModelForCausalLM, weights_folder(bundle, "llm")).eval()
    for module in (encoder, projector, llm):
        module.requires_grad_(False)  # not by a context manager: a session has its own threads
    graphs = bundle.manifest.graphs
    return Assistant(
        bundle,
        TorchGraph(graphs["encoder"], prepare(encoder)),
        TorchGraph(graphs["projector"], prepare(projector)),
        LanguageModel(bundle, TorchDecoder(prepare(llm))),
        "pytorch",
        threads,
    )


# --- llama.cpp ---


class LlamaCppDecoder(Decoder):
    """llama.cpp in the LLM's place; it holds one conversation."""

    def __init__(self, llm: "Llama"):
        self._llm = llm

    def open_cache(self, capacity: int):
        self._llm.rewind(0)
        return self._llm

    def run(self, embeddings: np.ndarray, cache, past: int) -> Scores:
        return Scores(cache.prefill(embeddings))

    def rewind(self, cache, length: int) -> None:
        cache.rewind(length)


def llama_cpp(bundle: Bundle, threads: int) -> Assistant:
    """Ours but for the LLM: the reference's weights in Q4_0."""
    from tiny_align.benchmarks.standard.peers import Llama, write_gguf
    from tiny_align.benchmarks.standard.training_cost import SHAPES

    shape = SHAPES["reference"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llm.gguf"
        tensors = reference_tensors(bundle, shape.head_size)
        write_gguf(path, shape, tensors, rope_theta=10_000.0)
        decoder = LlamaCppDecoder(Llama(path, shape, threads))
    return with_llm(bundle, decoder, threads)


GGUF_NAMES = {  # in llama.cpp -> in transformers
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


def reference_tensors(bundle: Bundle, head_size: int) -> "TensorSource":
    """The reference LLM's tensors by their names in a GGUF file."""
    from safetensors.numpy import load_file

    stored = load_file(weights_folder(bundle, "llm") / "model.safetensors")

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        layer, _, part = name.rpartition(".")
        prefix = layer.replace("blk", "model.layers") + "." if layer else ""
        values = stored[f"{prefix}{GGUF_NAMES[part]}.weight"].astype(np.float32)
        if part in ("attn_q", "attn_k"):
            return interleave_rotary(values, head_size)
        return values

    return tensor


def interleave_rotary(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of a head's halves -> pairs: transformers rotates the halves, llama.cpp neighbours."""
    heads = matrix.reshape(-1, 2, head_size // 2, matrix.shape[1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


def weights_folder(bundle: Bundle, name: str) -> Path:
    """The folder of the weights that the reference bundle is made of: "encoder" or "llm".

    Raises:
        TinyAlignError: it is another bundle, or the source tree is not here.
    """
    if bundle.manifest.name != "reference":
        raise TinyAlignError(
            "the bundle's weights are not known in this form, only the reference's are"
        )
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise TinyAlignError("the reference's weights are not here: run from the source tree")
    return folder


PIPELINES: dict[str, Callable[[Bundle, int], Assistant]] = {
    OURS: ours,
    "cascade, by our runtime": cascade,
    "ONNX Runtime, plain graphs": plain_graphs,
    "PyTorch, eager": torch_eager,
    "PyTorch, compiled": torch_compiled,
    "LLM by llama.cpp": llama_cpp,
    "TensorRT": tensorrt,
}
LEFT_OUT = {  # peer -> why no whole pipeline can be built on it
    "onnxruntime-genai": "takes no embeddings; its LLM alone is in "
    "`python -m tiny_align.benchmarks.studies.llm`",
}
