"""Lets the LLM's graph pick the top-k tokens, so that a step copies few logits from the device.

Only for the graph of every backend: ONNX Runtime's own leaves its logits in memory that the runtime
reads anyway.
"""

import dataclasses
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tiny_align.runtime.backends.base import TOPK_LOGITS, TOPK_TOKENS
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.bundle.onnx_weights import load_graph

TOPK = 64  # the most tokens that sampling may draw from; TensorRT 10.1 picks up to 3,840


def add_topk(path: Path, spec: GraphSpec) -> GraphSpec:
    """Rewrite a graph with `logits` (1, 1, V) to give the top-k of them as well.

    A vocabulary of at most TOPK tokens stays as it is.
    """
    logits, *others = spec.outputs
    vocabulary = logits.shape[-1]
    assert isinstance(vocabulary, int)
    if vocabulary <= TOPK:
        return spec
    topk_logits = TensorSpec(TOPK_LOGITS, "float32", (1, 1, TOPK))
    topk_tokens = TensorSpec(TOPK_TOKENS, "int64", (1, 1, TOPK))
    model = load_graph(path)
    graph = model.graph
    number = helper.make_tensor("best.number", TensorProto.INT64, [1], [TOPK])
    graph.initializer.append(number)
    inputs = [logits.name, number.name]
    outputs = [topk_logits.name, topk_tokens.name]
    graph.node.append(helper.make_node("TopK", inputs, outputs, axis=-1, largest=1, sorted=1))
    graph.output.insert(1, _value_info(topk_logits, TensorProto.FLOAT))
    graph.output.insert(2, _value_info(topk_tokens, TensorProto.INT64))
    onnx.save(model, str(path))
    return dataclasses.replace(spec, outputs=(logits, topk_logits, topk_tokens, *others))


def _value_info(tensor: TensorSpec, dtype: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)
