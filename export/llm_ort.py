"""The LLM's graph for ONNX Runtime: its own fused operators, and a KV cache that is written in place.

The attention is one GroupQueryAttention per layer, put there by transformers' own attention interface, so that what a
family does before it (norms of queries and keys, any rotary embedding) and asks of it (scale, soft cap, sliding window)
is the model's code and arguments. Around it transformers' fusions for ONNX Runtime do the rest.
"""

import torch
from transformers import AttentionInterface

from tiny_align.export.graphs import Graph, export_program
from tiny_align.export.llms import (
    EXAMPLE_PAST,
    EXAMPLE_TOKENS,
    fixed_frequencies,
    kv_shape,
    kv_specs,
)
from tiny_align.export.packing import pack_products, split_scaled_products
from tiny_align.runtime.bundle.manifest import TensorSpec
from tiny_align.runtime.errors import TinyAlignError

ATTENTION = "tiny_align_group_query"
HEAD_MULTIPLE = 8  # of GroupQueryAttention


class _Decoder(torch.nn.Module):
    """An LLM that reads embeddings into a cache of fixed capacity, `length` of it in use afterwards."""

    def __init__(self, llm):
        super().__init__()
        self.llm, self.config = llm, llm.config

    def forward(self, inputs_embeds, length, past):
        """inputs_embeds (1, tokens, D), length (1,) int32, past: a list of (1, heads, capacity, size)."""
        attend = _Attention(self.config, past, length)
        AttentionInterface.register(ATTENTION, attend)
        tokens = inputs_embeds.shape[1]
        positions = (length.long() - tokens).reshape(1, 1) + torch.arange(tokens)[None]
        out = self.llm(
            inputs_embeds=inputs_embeds, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return {"logits": out.logits, "present": attend.present}


class _Attention:
    """An attention function of transformers that becomes one operator; collects what it wrote to the cache."""

    def __init__(self, config, past, length):
        self._heads, self._past, self.present = config.num_attention_heads, past, []
        self._last, self._length = length - 1, length.reshape(())

    def __call__(
        self, module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, **_
    ):
        """query (1, heads, tokens, size), key and value (1, kv_heads, tokens, size): the new ones only."""
        past_key, past_value = self._past[2 * module.layer_idx : 2 * module.layer_idx + 2]
        attributes = {
            "num_heads": self._heads,
            "kv_num_heads": key.shape[1],
            "local_window_size": sliding_window or -1,
            "scale": float(scaling if scaling is not None else query.shape[-1] ** -0.5),
            "softcap": float(softcap or 0.0),
        }
        flat = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*flat, past_key, past_value, self._last, self._length],
            attributes,
            dtypes=[query.dtype] * 3,
            shapes=[flat[0].shape, past_key.shape, past_value.shape],
            version=1,
        )
        self.present += present
        return out.unflatten(2, (self._heads, -1)), None


def llm_ort_graph(llm) -> Graph:
    """inputs_embeds (1, tokens, D), length (1,) int32 and the cache -> the last position's logits, and the cache.

    `length` counts the positions in use after the call; every "past" and its "present" may be the same memory.

    Raises:
        TinyAlignError: heads of a size that ONNX Runtime's operator does not take.
    """
    config = llm.config
    heads, size = kv_shape(config)
    if size % HEAD_MULTIPLE:
        raise TinyAlignError(
            f"the LLM's heads have the size {size}: ONNX Runtime's attention takes multiples of {HEAD_MULTIPLE}"
        )
    capacity = EXAMPLE_PAST + EXAMPLE_TOKENS
    inputs = {
        "inputs_embeds": torch.randn(1, EXAMPLE_TOKENS, config.hidden_size),
        "length": torch.tensor([EXAMPLE_TOKENS], dtype=torch.int32),
        "past": [
            torch.zeros(1, heads, capacity, size) for _ in range(2 * config.num_hidden_layers)
        ],
    }
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        "inputs_embeds": {1: dynamic},
        "length": None,
        "past": [{2: dynamic} for _ in inputs["past"]],
    }
    implementation = config._attn_implementation
    AttentionInterface.register(ATTENTION, None)
    llm.set_attn_implementation(ATTENTION)
    try:
        with fixed_frequencies(llm):
            program = export_program(
                _Decoder(llm), inputs, dynamic_shapes=shapes, ort_fusions="cpu"
            )
    finally:
        llm.set_attn_implementation(implementation)
    pack_products(program)  # what the fusions have left
    split_scaled_products(program)
    return Graph(
        program,
        (
            TensorSpec("inputs_embeds", "float32", (1, "tokens", config.hidden_size)),
            TensorSpec("length", "int32", (1,)),
            *kv_specs(config, "past", "capacity"),
        ),
        (
            TensorSpec("logits", "float32", (1, 1, config.vocab_size)),
            *kv_specs(config, "present", "capacity"),
        ),
    )
