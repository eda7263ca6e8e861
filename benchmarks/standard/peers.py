"""One LLM under several engines, each behind two calls: prefill a prompt, decode one more token.

A peer is made from the models of benchmarks/studies/full_size.py and lives in a process of its own
(processes.py). Nothing here measures quality: the weights are random. pipelines.py uses `Llama` and
`write_gguf` with real ones.
"""

import ctypes
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.benchmarks.standard.training_cost import Shape
from tiny_align.export.pretrained import load_pretrained
from tiny_align.runtime.backends.onnxruntime import INT8_PRODUCTS

if TYPE_CHECKING:
    import torch

CONTEXT = 512  # positions


class Peer(ABC):
    """An LLM that decodes greedily."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> int:
        """Begin a new conversation with a prompt's token ids (T,) int; the next token."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Append a token; the next one."""

    def measure(self, prompt: np.ndarray, n_tokens: int) -> dict[str, Any]:
        """Seconds to prefill the prompt, and of each of `n_tokens` tokens."""
        began = time.perf_counter()
        token = self.prefill(prompt)
        marks = [time.perf_counter()]
        for _ in range(n_tokens):
            token = self.step(token)
            marks.append(time.perf_counter())
        return {"prefill_s": marks[0] - began, "steps_s": np.diff(marks).tolist()}


class TinyAlign(Peer):
    """The bundle's LLM through the runtime."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        from tiny_align.runtime.backends.registry import load_decoder
        from tiny_align.runtime.bundle.bundle import Bundle
        from tiny_align.runtime.llm import Cache, LanguageModel

        bundle = Bundle.open(work / "bundle", verify=False)
        spec = bundle.manifest.graphs["llm"].on("onnxruntime")
        decoder = load_decoder(bundle.graph("llm", "onnxruntime"), spec, "onnxruntime", threads)
        self._llm = LanguageModel(bundle, decoder)
        self._new_cache = Cache

    def prefill(self, ids: np.ndarray) -> int:
        self._cache = self._new_cache()
        return self._append(ids)

    def step(self, token: int) -> int:
        return self._append(np.array([token]))

    def _append(self, ids: np.ndarray) -> int:
        scores = self._llm.prefill(self._llm.embed(ids), self._cache)
        return int(scores.topk(1)[0][0])


class LlamaCpp(Peer):
    """llama.cpp on a Q4_0 file of the same shapes; the prompt as embeddings, as ours."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        path = work / "llm.q4_0.gguf"
        if not path.exists():
            write_gguf(path, shape, random_tensors())
        self._llm = Llama(path, shape, threads)
        self._table = np.load(
            work / "bundle" / "token_embeddings.npy", mmap_mode="r", allow_pickle=False
        )

    def prefill(self, ids: np.ndarray) -> int:
        self._llm.rewind(0)
        return int(self._llm.prefill(self._table[ids].astype(np.float32)).argmax())

    def step(self, token: int) -> int:
        return int(self._llm.step(token).argmax())


class Llama:
    """A GGUF file in llama.cpp: embeddings or a token in, logits out."""

    def __init__(self, path: Path, shape: Shape, threads: int):
        import llama_cpp as api

        self._api = api
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)
        self._vocabulary = shape.vocabulary
        self._past = 0  # positions in the cache
        self._embeddings = api.llama_batch_init(CONTEXT, shape.hidden, 1)
        self._tokens = api.llama_batch_init(CONTEXT, 0, 1)

    def rewind(self, length: int) -> None:
        """Forget all but the first positions."""
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), 0, length, -1)
        self._past = length

    def prefill(self, rows: np.ndarray) -> np.ndarray:
        """(T, D) float32 embeddings -> (V,) float32 logits of the last position."""
        rows = np.ascontiguousarray(rows)
        ctypes.memmove(
            ctypes.addressof(self._embeddings.embd.contents), rows.ctypes.data, rows.nbytes
        )
        return self._decode(self._embeddings, len(rows))

    def step(self, token: int) -> np.ndarray:
        """One token -> (V,) float32 logits."""
        self._tokens.token[0] = token
        return self._decode(self._tokens, 1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Tokens -> (T, V) float32 logits of all of them."""
        for i, token in enumerate(tokens):
            self._tokens.token[i] = token
        self._decode(self._tokens, len(tokens), all_logits=True)
        rows = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(tokens), self._vocabulary))

    def _decode(self, batch: Any, n: int, all_logits: bool = False) -> np.ndarray:
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i] = self._past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == n - 1
        self._past += n
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocabulary,))


# a tensor's name in a GGUF file and its shape -> float32 values
TensorSource = Callable[[str, tuple[int, ...]], np.ndarray]


def random_tensors() -> TensorSource:
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    return draw


def write_gguf(
    path: Path, shape: Shape, tensors: TensorSource, rope_theta: float = 500_000.0
) -> None:
    """A llama of this shape whose output layer is its embedding table, every matrix in Q4_0."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([1] * shape.vocabulary)

    def add(name: str, *sizes: int) -> None:
        values = tensors(name, sizes)
        if len(sizes) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            quantised = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)

    add("token_embd", shape.vocabulary, shape.hidden)  # the output layer too
    add("output_norm", shape.hidden)
    query_size = shape.heads * shape.head_size
    key_size = shape.kv_heads * shape.head_size
    for i in range(shape.layers):
        layer = f"blk.{i}"
        add(f"{layer}.attn_norm", shape.hidden)
        add(f"{layer}.ffn_norm", shape.hidden)
        add(f"{layer}.attn_q", query_size, shape.hidden)
        add(f"{layer}.attn_k", key_size, shape.hidden)
        add(f"{layer}.attn_v", key_size, shape.hidden)
        add(f"{layer}.attn_output", shape.hidden, query_size)
        add(f"{layer}.ffn_gate", shape.mlp, shape.hidden)
        add(f"{layer}.ffn_up", shape.mlp, shape.hidden)
        add(f"{layer}.ffn_down", shape.hidden, shape.mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Transformers(Peer):
    """transformers in PyTorch, eager, FP32."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = load_pretrained(AutoModelForCausalLM, work / "llm", dtype=torch.float32)
        self._embed = self._model.get_input_embeddings()
        self._torch = torch
        self._new_cache = DynamicCache

    def prefill(self, ids: np.ndarray) -> int:
        self._cache = self._new_cache()
        return self._append(self._torch.from_numpy(ids))

    def step(self, token: int) -> int:
        return self._append(self._torch.tensor([token]))

    def _append(self, ids: "torch.Tensor") -> int:
        out = self._model(
            inputs_embeds=self._embed(ids)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(out.logits[0, 0].argmax())


class Genai(Peer):
    """onnxruntime-genai on the bundle's own graph, by token ids: it takes no embeddings."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        import onnxruntime_genai as genai

        folder = work / "genai"
        write_genai(folder, work / "bundle", shape, threads)
        self._api = genai
        self._model = genai.Model(str(folder))

    def prefill(self, ids: np.ndarray) -> int:
        options = self._api.GeneratorParams(self._model)
        options.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self._generator = self._api.Generator(self._model, options)
        self._generator.append_tokens(ids.astype(np.int32))
        return self.step(0)

    def step(self, token: int) -> int:
        """Its next token; it has appended the one before itself."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def write_genai(folder: Path, bundle: Path, shape: Shape, threads: int) -> None:
    """The bundle's LLM as onnxruntime-genai loads it: graph, weights and configuration."""
    folder.mkdir(exist_ok=True)
    for data in bundle.glob("llm*.data"):
        (folder / data.name).unlink(missing_ok=True)
        (folder / data.name).hardlink_to(data)  # a symbolic link is refused
    write_genai_graph(folder, bundle)
    config = genai_config(shape, threads)
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_genai_graph(folder: Path, bundle: Path) -> None:
    """The bundle's graph for ONNX Runtime behind an embedding table: inputs are ids and a mask."""
    import onnx
    from onnx import TensorProto, helper

    table = np.load(bundle / "token_embeddings.npy", mmap_mode="r", allow_pickle=False)
    table.tofile(folder / "embeddings.data")
    embeddings = TensorProto(name="embeddings", data_type=TensorProto.FLOAT16, dims=table.shape)
    embeddings.data_location = TensorProto.EXTERNAL
    embeddings.external_data.add(key="location", value="embeddings.data")

    model = onnx.load(str(bundle / "llm.ort.onnx"), load_external_data=False)
    graph = model.graph
    graph.initializer.append(embeddings)
    cache_inputs = []
    for value in graph.input:
        if value.name not in ("inputs_embeds", "length"):
            cache_inputs.append(value)
    del graph.input[:]
    for name in ("input_ids", "attention_mask"):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1, name]))
    graph.input.extend(cache_inputs)

    embed_nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["fp16_embeds"]),
        helper.make_node("Cast", ["fp16_embeds"], ["inputs_embeds"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["attention_mask"], ["int64_length"], start=1),
        helper.make_node("Cast", ["int64_length"], ["length"], to=TensorProto.INT32),
    ]
    nodes = [*embed_nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(folder / "model.onnx"))


def genai_config(shape: Shape, threads: int) -> dict[str, Any]:
    """genai_config.json of the graph that `write_genai_graph` writes."""
    decoder = {
        "session_options": {
            "intra_op_num_threads": threads,
            "session.qdq_matmulnbits_accuracy_level": INT8_PRODUCTS,
            "provider_options": [],
        },
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past.%d.key",
            "past_value_names": "past.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "llama",
        "context_length": CONTEXT,
        "vocab_size": shape.vocabulary,
        "decoder": decoder,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return {"model": model, "search": {"max_length": CONTEXT, "past_present_share_buffer": True}}


PEERS: dict[str, type[Peer]] = {
    "tiny-align": TinyAlign,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "onnxruntime-genai": Genai,
}
