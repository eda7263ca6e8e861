"""Transformers models written as GGUF files, as llama.cpp's converter writes them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

NAMES = {  # transformers' name of a module -> llama.cpp's name of its tensor
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMAS = ("gemma2", "gemma3")
PAIRED = ("llama", "smollm3")  # their converter reorders rows of queries and keys
BYTE_TOKEN = "<0x"


@dataclass
class Source:
    """What goes into a file; tests change it before it is written.

    Attributes:
        fields: name -> value; int, float, bool, str or a list of one of them.
        tensors: llama.cpp's name -> array, float32 or blocks of the type in `types`.
    """

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    types: dict[str, gguf.GGMLQuantizationType] = field(default_factory=dict)

    def quantise(self, name: str, kind: str) -> None:
        self.types[name] = gguf.GGMLQuantizationType[kind]
        self.tensors[name] = gguf.quants.quantize(self.tensors[name], self.types[name])

    def write(self, path: Path) -> Path:
        fields = dict(self.fields)
        writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
        adders: dict[type, Callable] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for name, value in fields.items():
            adders[type(value)](name, value)
        for name, array in self.tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=self.types.get(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def source(folder: Path, architecture: str, pre: str | None) -> Source:
    """A model folder as its converter would write it, in FP32.

    Args:
        pre: the name of the pre-tokenizer; None for a SentencePiece vocabulary.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    fields = sizes(model.config, architecture)
    fields |= vocabulary(tokenizer, model.config.vocab_size, pre)
    ends = model.generation_config.eos_token_id
    for name, end in zip(("eos", "eot", "eom"), ends):
        fields[f"tokenizer.ggml.{name}_token_id"] = end
    return Source({"general.architecture": architecture} | fields, tensors(model, architecture))


def sizes(config: Any, architecture: str) -> dict[str, Any]:
    """The fields of a configuration."""
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "layer_norm_eps", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    if architecture == "gemma3":
        found["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config.layer_types
        ]
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found["rope.freq_base"] = float(rope["rope_theta"])
    head_size = found["attention.key_length"] or config.hidden_size // config.num_attention_heads
    found["rope.dimension_count"] = int(head_size * rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / original
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(stretch) / np.log(original)))
    return {f"{architecture}.{name}": x for name, x in found.items() if x is not None}


def vocabulary(tokenizer: Any, n_rows: int, pre: str | None) -> dict[str, Any]:
    """The fields of a tokenizer, padded to the rows of the embedding table."""
    ids = tokenizer.get_vocab()
    texts = {number: token for token, number in ids.items()}
    added = tokenizer.added_tokens_decoder
    tokens = []
    types = []
    for number in range(n_rows):
        token = texts.get(number, f"[PAD{number}]")
        kind = gguf.TokenType.NORMAL if number in texts else gguf.TokenType.UNUSED
        if number in added:
            is_special = added[number].special
            kind = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
        elif pre is None and token.startswith(BYTE_TOKEN):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    for name, token in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{token}_token_id")
        if number is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = number
    if pre is None:
        scores = [-float(number) for number in range(n_rows)]
        spaces = not isinstance(tokenizer, transformers.GemmaTokenizer)
        sentence = {"model": "llama", "pre": "default", "scores": scores}
        sentence["add_space_prefix"] = spaces
        return fields | {f"tokenizer.ggml.{name}": value for name, value in sentence.items()}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    byte_level = {"model": "gpt2", "pre": pre, "merges": merges}
    return fields | {f"tokenizer.ggml.{name}": value for name, value in byte_level.items()}


def tensors(model: torch.nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, changed as its converter does."""
    config = model.config
    names = GEMMA_NAMES if architecture in GEMMAS else NAMES
    found = {}
    for name, value in model.named_parameters():
        array = value.detach().numpy()
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        if stem.startswith("layers."):
            _, number, inner = stem.split(".", 2)
            target = f"blk.{number}.{names[inner]}"
        else:
            target = names[stem]
        if architecture in GEMMAS and target.endswith("norm"):
            array = array + 1
        if architecture in PAIRED and target.endswith("attn_q"):
            array = interleave_rotary(array, config.num_attention_heads)
        if architecture in PAIRED and target.endswith("attn_k"):
            array = interleave_rotary(array, config.num_key_value_heads)
        found[f"{target}.{kind}"] = array
    return found | rope_tensors(model)


def interleave_rotary(matrix: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them for its rotation."""
    rotary = matrix.reshape(n_heads, 2, len(matrix) // n_heads // 2, -1)
    return rotary.swapaxes(1, 2).reshape(matrix.shape)


def rope_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What Llama 3's and LongRoPE's frequencies are divided by."""
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_short.weight": np.float32(rope["short_factor"]),
            "rope_factors_long.weight": np.float32(rope["long_factor"]),
        }
    if rope.get("rope_type") != "llama3":
        return {}
    scaled = model.model.rotary_emb.inv_freq.double().numpy()
    n = 2 * len(scaled)
    plain = rope["rope_theta"] ** (-np.arange(0, n, 2) / n)
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
