"""INT8 products for an encoder, calibrated on a person's own recordings: static, symmetric, every zero-point zero.

What goes into a product with a weight is quantised with one scale, which the recordings decide; the weight with one for
every column, in the graph as INT8. Biases stay as they are, and so do products of two activations (attention) and
convolutions. What TensorRT wants of Q/DQ: zero-points of zero, scales above zero.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tiny_align.engines.fp16 import drop_unused

HIGHEST = 127  # of an INT8 code; -128 is not used
KEPT = 4096  # values of a tensor and a recording that its scale is chosen by
CLIPS = np.linspace(0.3, 1.0, 36)  # of the largest magnitude, to choose from


def product_inputs(model: onnx.ModelProto) -> list[str]:
    """The values that are multiplied with a weight (K, N), each once."""
    return list(dict.fromkeys(node.input[0] for node in _products(model)))


def _products(model: onnx.ModelProto) -> list:
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights
    ]


def watched(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with `product_inputs` as its outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    names = product_inputs(model)
    result.graph.output.extend(
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names
    )
    return result


def scales(runs: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """The scale of every value: the one that rounds what the recordings gave with the least square error.

    Args:
        runs: for every recording, value -> what it was.
    """
    kept, largest = {}, {}
    for run in runs:
        for name, array in run.items():
            magnitudes = np.abs(array).ravel()
            largest[name] = max(largest.get(name, 0.0), float(magnitudes.max()))
            kept.setdefault(name, []).append(magnitudes[:: -(-len(magnitudes) // KEPT)])
    return {
        name: _best_scale(np.concatenate(values), largest[name]) for name, values in kept.items()
    }


def _best_scale(magnitudes: np.ndarray, largest: float) -> float:
    candidates = CLIPS * (largest or 1.0) / HIGHEST
    errors = [
        np.square(np.minimum(np.rint(magnitudes / s), HIGHEST) * s - magnitudes).sum()
        for s in candidates
    ]
    return float(candidates[len(errors) - 1 - int(np.argmin(errors[::-1]))])  # the widest of equals


def int8(model: onnx.ModelProto, chosen: dict[str, float], values) -> onnx.ModelProto:
    """The graph with products of INT8 codes.

    Args:
        model: the FP32 graph; its weights may lie in other files.
        chosen: of each of its `product_inputs`, the scale.
        values: a tensor of it -> its values, float32.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, nodes, done = result.graph, [], {}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {node.output[0] for node in _products(model)}
    for node in graph.node:
        if node.output[0] in products:
            for index, name in enumerate(node.input):
                if name not in done:
                    made, tensors = (
                        _rounded(name, chosen[name])
                        if index == 0
                        else _codes(values(weights[name]), name)
                    )
                    done[name] = made[-1].output[0]
                    nodes.extend(made)
                    graph.initializer.extend(tensors)
                node.input[index] = done[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return result


def _rounded(name: str, scale: float) -> tuple[list, list]:
    """Nodes that quantise a value and dequantise it again, and their constants."""
    q, dq, at, zero = (f"{name}.{part}" for part in ("quantised", "dequantised", "scale", "zero"))
    nodes = [
        helper.make_node("QuantizeLinear", [name, at, zero], [q]),
        helper.make_node("DequantizeLinear", [q, at, zero], [dq]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(scale), at),
        numpy_helper.from_array(np.int8(0), zero),
    ]
    return nodes, constants


def _codes(weight: np.ndarray, name: str) -> tuple[list, list]:
    """The node that dequantises a weight (K, N), and its codes and their scales, one for each column."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest == 0, 1, largest / HIGHEST).astype(np.float32)
    constants = [
        numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), f"{name}.codes"),
        numpy_helper.from_array(scale, f"{name}.scales"),
        numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}.zeros"),
    ]
    node = helper.make_node(
        "DequantizeLinear", [c.name for c in constants], [f"{name}.dequantised"], axis=1
    )
    return [node], constants
