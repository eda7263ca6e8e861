"""LLMs in GGUF, llama.cpp's format, to checkpoints: SmolLM2 (Llama) and Gemma 3, in FP32.

The package `gguf` reads the file and dequantises its blocks. Sizes, tokenizer and chat template are
the file's own. Other architectures are not covered.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.reference.checkpoints import write_generation_config, write_model, write_tokenizer
from tiny_align.reference.vocabularies import (
    SPACE,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

# llama.cpp's name of a tensor -> transformers' name of its module
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {  # what the two architectures name differently
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
SPECIAL = 3  # a token's type: <eos>, for example
USER_DEFINED = 4  # never split, but not special
SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
LOCAL_ROPE_THETA = 10_000.0  # of Gemma 3's layers with a sliding window; not in the file


class GGUF:
    """A GGUF file that is read from the disk as its parts are asked for."""

    def __init__(self, path: Path):
        from gguf import GGUFReader

        self._reader = GGUFReader(path)
        self.architecture: str = self.get("general.architecture")

    def get(self, name: str) -> Any:
        """A field's value; None if the file lacks it."""
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def size(self, name: str) -> Any:
        """A field of the architecture's own; None if the file lacks it."""
        value = self.get(f"{self.architecture}.{name}")
        if isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-06, not 9.99999997e-07
        return value

    def weights(self) -> dict[str, np.ndarray]:
        """The name of a parameter in transformers -> float32 array as transformers orders it."""
        weights = {}
        for tensor in self._reader.tensors:
            weights[self._parameter(tensor.name)] = self._values(tensor)
        return weights

    def _parameter(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")  # kind: "weight"
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer is None:
            return f"model.{OUTER[stem]}.{kind}"
        number, inner = layer.groups()
        module = LAYER.get(inner) or NORMS[self.architecture][inner]
        return f"model.layers.{number}.{module}.{kind}"

    def _values(self, tensor: "ReaderTensor") -> np.ndarray:
        from gguf.quants import dequantize

        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
        if self.architecture == "gemma3" and tensor.name.endswith("_norm.weight"):
            return values - 1  # llama.cpp multiplies by w, transformers by 1 + w
        if self.architecture == "llama" and tensor.name.endswith("attn_q.weight"):
            return _split_rotary_pairs(values, self.size("attention.head_count"))
        if self.architecture == "llama" and tensor.name.endswith("attn_k.weight"):
            return _split_rotary_pairs(values, self.size("attention.head_count_kv"))
        return values


def _split_rotary_pairs(matrix: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rows: llama.cpp rotates rows 0 and 1 of a head together, transformers 0 and d / 2."""
    n_rows, n_columns = matrix.shape
    pairs = matrix.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns)
    return pairs.swapaxes(1, 2).reshape(n_rows, n_columns)


def write_llm(path: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file: weights, sizes, tokenizer, chat template."""
    model = GGUF(path)
    tokens = model.get("tokenizer.ggml.tokens")
    special_ids = {}
    special_names = {}
    for name, field in SPECIAL_TOKENS.items():
        number = model.get(f"tokenizer.ggml.{field}")
        special_names[name] = tokens[number]
        if name != "unk_token":  # known to tokenizers only
            special_ids[f"{name}_id"] = number
    kind, config = _architecture(model, vocab_size=len(tokens), **special_ids)
    write_model(folder, kind, config, model.weights())
    write_generation_config(folder, **special_ids)
    write_tokenizer(
        folder,
        _tokenizer(model, tokens, special_names),
        chat_template=model.get("tokenizer.chat_template"),
        model_max_length=model.size("context_length"),
        **special_names,
    )


def _architecture(model: GGUF, **settings: Any) -> "tuple[type[PreTrainedModel], PreTrainedConfig]":
    """Transformers' class of the model, and its configuration."""
    import transformers

    n_heads = model.size("attention.head_count")
    hidden_size = model.size("embedding_length")
    settings |= {
        "hidden_size": hidden_size,
        "intermediate_size": model.size("feed_forward_length"),
        "num_hidden_layers": model.size("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": model.size("attention.head_count_kv"),
        "head_dim": model.size("attention.key_length") or hidden_size // n_heads,
        "max_position_embeddings": model.size("context_length"),
        "rms_norm_eps": model.size("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": True,
    }
    rope = {"rope_type": "default", "rope_theta": model.size("rope.freq_base")}
    if model.architecture == "llama":
        config = transformers.LlamaConfig(**settings, rope_parameters=rope)
        return transformers.LlamaForCausalLM, config
    ropes = {
        "full_attention": rope,
        "sliding_attention": {**rope, "rope_theta": LOCAL_ROPE_THETA},
    }
    window = model.size("attention.sliding_window")
    return transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(
        **settings, rope_parameters=ropes, sliding_window=window
    )


def _tokenizer(model: GGUF, tokens: list[str], special_names: dict[str, str]) -> "Tokenizer":
    types = model.get("tokenizer.ggml.token_type")
    if model.get("tokenizer.ggml.model") == "gpt2":
        merges = []
        for line in model.get("tokenizer.ggml.merges"):
            left, right = line.split(" ")
            merges.append((left, right))
        return byte_level_tokenizer(tokens, merges, _added_tokens(tokens, types))
    spelled = []
    for token in tokens:
        is_spaces = set(token) == {" "}
        spelled.append(SPACE * len(token) if is_spaces else token)
    return sentencepiece_tokenizer(
        spelled,
        _added_tokens(spelled, types),
        special_names["unk_token"],
        special_names["bos_token"],
        space_before=False,
    )


def _added_tokens(tokens: list[str], types: list[int]) -> "list[AddedToken]":
    from tokenizers import AddedToken

    added = []
    for token, kind in zip(tokens, types):
        if kind in (SPECIAL, USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=kind == SPECIAL))
    return added
