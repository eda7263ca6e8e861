"""The best few tokens picked by the LLM's graph itself, so that a step brings a few numbers from the device.

For the plain graph: ONNX Runtime's own leaves its logits where the runtime reads them anyway.
"""

import dataclasses
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tiny_align.runtime.backends.base import TOPK_LOGITS, TOPK_TOKENS
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec

TOPK = 64  # the most that a token may be drawn from; TensorRT 10.1 picks up to 3,840


def add_topk(path: Path, spec: GraphSpec) -> GraphSpec:
    """Rewrite a graph with `logits` (1, 1, V) to give the best of them as well; a small vocabulary stays as it is."""
    logits, *others = spec.outputs
    if logits.shape[-1] <= TOPK:
        return spec
    best = (
        TensorSpec(TOPK_LOGITS, "float32", (1, 1, TOPK)),
        TensorSpec(TOPK_TOKENS, "int64", (1, 1, TOPK)),
    )
    model = onnx.load(str(path), load_external_data=False)
    graph, number = model.graph, helper.make_tensor("best.number", TensorProto.INT64, [1], [TOPK])
    graph.initializer.append(number)
    names = [tensor.name for tensor in best]
    graph.node.append(
        helper.make_node("TopK", [logits.name, number.name], names, axis=-1, largest=1, sorted=1)
    )
    for place, (tensor, kind) in enumerate(zip(best, (TensorProto.FLOAT, TensorProto.INT64)), 1):
        graph.output.insert(place, helper.make_tensor_value_info(tensor.name, kind, tensor.shape))
    onnx.save(model, str(path))
    return dataclasses.replace(spec, outputs=(logits, *best, *others))
