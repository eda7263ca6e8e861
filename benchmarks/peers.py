"""One LLM under several engines, each behind the same two calls: read a prompt, and one token more.

A peer is made from the models of benchmarks.full_size and lives in a process of its own (`Served`): its threads, its
memory and its crashes are its own. Nothing here measures quality: weights are random.
"""

import ctypes
import json
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np

from tiny_align.benchmarks.training_cost import Shape
from tiny_align.runtime.ort import INT8_PRODUCTS

CONTEXT = 512  # positions


class TinyAlign:
    """The bundle's LLM through the runtime."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        from tiny_align.runtime.backend import load_decoder
        from tiny_align.runtime.bundle import Bundle
        from tiny_align.runtime.llm import Cache, LanguageModel

        bundle, self._new = Bundle.open(work / "bundle", verify=False), Cache
        spec = bundle.manifest.graphs["llm"].on("onnxruntime")
        self._llm = LanguageModel(
            bundle, load_decoder(bundle.graph("llm", "onnxruntime"), spec, "onnxruntime", threads)
        )

    def prefill(self, ids: np.ndarray) -> int:
        self._cache = self._new()
        return int(self._llm.prefill(self._llm.embed(ids), self._cache).argmax())

    def step(self, token: int) -> int:
        return int(self._llm.prefill(self._llm.embed([token]), self._cache).argmax())


class LlamaCpp:
    """llama.cpp on a Q4_0 file of the same shapes; the prompt as embeddings, as ours."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        import llama_cpp as api

        path = work / "llm.q4_0.gguf"
        if not path.exists():
            write_gguf(path, shape)
        self._api = api
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)
        self._size, self._vocabulary, self._past = shape.hidden, shape.vocabulary, 0
        self._embeddings = api.llama_batch_init(CONTEXT, shape.hidden, 1)
        self._token = api.llama_batch_init(1, 0, 1)
        self._table = np.load(work / "bundle" / "token_embeddings.npy", mmap_mode="r")

    def prefill(self, ids: np.ndarray) -> int:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._past, rows = 0, self._table[ids].astype(np.float32)
        ctypes.memmove(ctypes.addressof(self._embeddings.embd.contents), rows.ctypes.data, rows.nbytes)
        return self._decode(self._embeddings, len(ids))

    def step(self, token: int) -> int:
        self._token.token[0] = token
        return self._decode(self._token, 1)

    def _decode(self, batch, n: int) -> int:
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = self._past + i, 1, 0
            batch.logits[i] = i == n - 1
        self._past += n
        if status := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def write_gguf(path: Path, shape: Shape) -> None:
    """A llama of this shape with random weights, every matrix in Q4_0."""
    import gguf

    writer, rng, kind = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_0
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([1] * shape.vocabulary)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))

    matrix("token_embd", shape.vocabulary, shape.hidden)  # the output layer too
    ones("output_norm")
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    for layer in range(shape.layers):
        place = f"blk.{layer}"
        ones(f"{place}.attn_norm")
        ones(f"{place}.ffn_norm")
        for name, rows in (("attn_q", wide), ("attn_k", narrow), ("attn_v", narrow)):
            matrix(f"{place}.{name}", rows, shape.hidden)
        matrix(f"{place}.attn_output", shape.hidden, wide)
        matrix(f"{place}.ffn_gate", shape.mlp, shape.hidden)
        matrix(f"{place}.ffn_up", shape.mlp, shape.hidden)
        matrix(f"{place}.ffn_down", shape.hidden, shape.mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Transformers:
    """transformers in PyTorch, eager, FP32."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(work / "llm", dtype=torch.float32)
        self._torch, self._new, self._embed = torch, DynamicCache, self._model.get_input_embeddings()

    def prefill(self, ids: np.ndarray) -> int:
        self._cache = self._new()
        return self._read(self._torch.from_numpy(ids))

    def step(self, token: int) -> int:
        return self._read(self._torch.tensor([token]))

    def _read(self, ids) -> int:
        out = self._model(
            inputs_embeds=self._embed(ids)[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(out.logits[0, 0].argmax())


class Genai:
    """onnxruntime-genai on the bundle's own graph, which it gets token ids for: it takes no embeddings."""

    def __init__(self, work: Path, shape: Shape, threads: int):
        import onnxruntime_genai as genai

        folder = work / "genai"
        write_genai(folder, work / "bundle", shape, threads)
        self._api, self._model = genai, genai.Model(str(folder))

    def prefill(self, ids: np.ndarray) -> int:
        options = self._api.GeneratorParams(self._model)
        options.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self._generator = self._api.Generator(self._model, options)
        self._generator.append_tokens(ids.astype(np.int32))
        return self.step(0)

    def step(self, token: int) -> int:
        """Its next token; it remembers the one before."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def write_genai(folder: Path, bundle: Path, shape: Shape, threads: int) -> None:
    """Our fused graph with token ids and a mask for inputs, and the configuration that onnxruntime-genai reads."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir(exist_ok=True)
    for data in bundle.glob("llm*.data"):
        (folder / data.name).unlink(missing_ok=True)
        (folder / data.name).hardlink_to(data)  # a symbolic link is refused
    table = np.load(bundle / "token_embeddings.npy", mmap_mode="r")
    table.tofile(folder / "embeddings.data")
    model = onnx.load(str(bundle / "llm.ort.onnx"), load_external_data=False)
    graph = model.graph
    rows = TensorProto(name="embeddings", data_type=TensorProto.FLOAT16, dims=table.shape)
    rows.data_location = TensorProto.EXTERNAL
    rows.external_data.add(key="location", value="embeddings.data")
    graph.initializer.append(rows)
    kept = [value for value in graph.input if value.name not in ("inputs_embeds", "length")]
    del graph.input[:]
    for name in ("input_ids", "attention_mask"):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1, name]))
    graph.input.extend(kept)
    front = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["halves"]),
        helper.make_node("Cast", ["halves"], ["inputs_embeds"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["attention_mask"], ["wide_length"], start=1),
        helper.make_node("Cast", ["wide_length"], ["length"], to=TensorProto.INT32),
    ]
    nodes = [*front, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(folder / "model.onnx"))
    session = {"intra_op_num_threads": threads, "session.qdq_matmulnbits_accuracy_level": INT8_PRODUCTS}
    names = {"past_key_names": "past.%d.key", "past_value_names": "past.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {**session, "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names},
        "outputs": {"logits": "logits", **present},
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model_part = {"type": "llama", "context_length": CONTEXT, "vocab_size": shape.vocabulary, "decoder": decoder, **ids}
    search = {"max_length": CONTEXT, "past_present_share_buffer": True}
    (folder / "genai_config.json").write_text(json.dumps({"model": model_part, "search": search}))


PEERS = {
    "tiny-align": TinyAlign,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "onnxruntime-genai": Genai,
}


class Served:
    """A peer in a process of its own; `why` says why there is none."""

    def __init__(self, name: str, work: Path, shape: Shape, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, work, shape, threads), daemon=True)
        self._process.start()
        other.close()
        self.why = self._ask(None)

    def measure(self, prompt: np.ndarray, tokens: int) -> dict | None:
        """Seconds to read the prompt and, each, of `tokens` tokens; None where the peer has failed."""
        answer = self._ask((prompt, tokens)) if self.why is None else None
        if isinstance(answer, str):
            self.why = answer
            return None
        return answer

    def _ask(self, question):
        try:
            if question is not None:
                self._pipe.send(question)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return f"its process ended (exit status {self._process.exitcode})"

    def close(self) -> None:
        self._pipe.close()  # and its process ends
        self._process.join()


def _serve(pipe, name: str, work: Path, shape: Shape, threads: int) -> None:
    try:
        began = time.perf_counter()
        peer = PEERS[name](work, shape, threads)
        load_s = time.perf_counter() - began
        pipe.send(None)
        while True:
            pipe.send(_measure(peer, *pipe.recv()) | {"load_s": load_s})
    except EOFError:  # no more questions
        return
    except Exception as error:  # any peer's, to be reported in its place
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _measure(peer, prompt: np.ndarray, tokens: int) -> dict:
    began = time.perf_counter()
    token, marks = peer.prefill(prompt), [time.perf_counter()]
    for _ in range(tokens):
        token = peer.step(token)
        marks.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"prefill_s": marks[0] - began, "steps_s": np.diff(marks).tolist(), "peak_gb": peak}
