"""The LLM's graph for ONNX Runtime, whose fused attention writes the KV cache in place.

A graph of standard operators, which TensorRT needs, would copy the cache at every token.

Each layer's attention is one GroupQueryAttention, put there by transformers' own attention
interface: what a family does before it (norms of queries and keys, any rotary embedding) and asks
of it (scale, soft cap, sliding window) is the model's code and arguments. Transformers' fusions for
ONNX Runtime do the rest.
"""

from typing import TYPE_CHECKING, Any

import onnx_ir
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from tiny_align.export.graphs import Graph, export_program
from tiny_align.export.llms import (
    EXAMPLE_PAST,
    EXAMPLE_TOKENS,
    fixed_frequencies,
    kv_shape,
    kv_specs,
)
from tiny_align.export.packing import pack_products, split_scaled_products
from tiny_align.export.program_weights import name_weights
from tiny_align.runtime.bundle.manifest import TensorSpec
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tiny_align_group_query"
HEAD_MULTIPLE = 8  # GroupQueryAttention takes multiples of it as head size


class _Attention:
    """An attention function of transformers that becomes one operator; collects what it writes."""

    def __init__(self, n_heads: int, past: list[Tensor], length: Tensor):
        self.present: list[Tensor] = []
        self._n_heads = n_heads
        self._past = past
        self._last = length - 1
        self._length = length.reshape(())

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """query (1, heads, tokens, size); key, value (1, kv_heads, tokens, size): the new ones."""
        assert isinstance(module.layer_idx, int)
        past_key = self._past[2 * module.layer_idx]
        past_value = self._past[2 * module.layer_idx + 1]
        attributes: dict[str, Any] = {
            "num_heads": self._n_heads,
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
        return out.unflatten(2, (self._n_heads, -1)), None


class _Decoder(torch.nn.Module):
    """An LLM with a cache of fixed capacity; after a call `length` positions of it are in use."""

    def __init__(self, llm: "PreTrainedModel"):
        super().__init__()
        self.llm = llm
        self.config = llm.config

    def forward(
        self, inputs_embeds: Tensor, length: Tensor, past: list[Tensor]
    ) -> dict[str, Tensor | list[Tensor]]:
        """inputs_embeds (1, tokens, D), length (1,) int32, past (1, heads, capacity, size) each."""
        attention = _Attention(self.config.num_attention_heads, past, length)
        AttentionInterface.register(ATTENTION, attention)
        tokens = inputs_embeds.shape[1]
        positions = (length.long() - tokens).reshape(1, 1) + torch.arange(tokens)[None]
        out = self.llm(
            inputs_embeds=inputs_embeds, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return {"logits": out.logits, "present": attention.present}


def llm_ort_graph(llm: "PreTrainedModel") -> Graph:
    """inputs_embeds (1, tokens, D), length (1,) int32 and the cache -> logits (1, 1, V), the cache.

    The logits are the last position's. `length` counts the positions in use after the call. Every
    "past" and its "present" may be the same memory.

    Raises:
        TinyAlignError: heads of a size that ONNX Runtime's operator does not take.
    """
    config = llm.config
    heads, size = kv_shape(config)
    if size % HEAD_MULTIPLE:
        raise TinyAlignError(
            f"the LLM's heads have the size {size}: ONNX Runtime's attention takes multiples of "
            f"{HEAD_MULTIPLE}"
        )
    program = _trace(llm)
    name_weights(program.graph, llm.named_parameters())
    pack_products(program)  # before the fusions, which would copy the weights
    fuse_for_onnxruntime(program, "cpu")
    split_scaled_products(program)
    return Graph(
        program,
        inputs=(
            TensorSpec("inputs_embeds", "float32", (1, "tokens", config.hidden_size)),
            TensorSpec("length", "int32", (1,)),
            *kv_specs(config, "past", "capacity"),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, 1, config.vocab_size)),
            *kv_specs(config, "present", "capacity"),
        ),
    )


def _trace(llm: "PreTrainedModel") -> onnx_ir.Model:
    config = llm.config
    heads, size = kv_shape(config)
    capacity = EXAMPLE_PAST + EXAMPLE_TOKENS
    past = [torch.zeros(1, heads, capacity, size) for _ in range(2 * config.num_hidden_layers)]
    inputs = {
        "inputs_embeds": torch.randn(1, EXAMPLE_TOKENS, config.hidden_size),
        "length": torch.tensor([EXAMPLE_TOKENS], dtype=torch.int32),
        "past": past,
    }
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        "inputs_embeds": {1: dynamic},
        "length": None,
        "past": [{2: dynamic}] * len(past),
    }
    implementation = config._attn_implementation
    AttentionInterface.register(ATTENTION, _Attention)  # so that the name is known; see _Decoder
    llm.set_attn_implementation(ATTENTION)
    try:
        with fixed_frequencies(llm):
            return export_program(_Decoder(llm), inputs, dynamic_shapes=shapes)
    finally:
        llm.set_attn_implementation(implementation)
