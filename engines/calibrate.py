"""INT8 products for an encoder, calibrated on recordings of its user.

Quantisation is static and symmetric: all zero-points are zero.

The input of each product with a weight is quantised with one scale, which `find_scales` finds
on the recordings. The weight is stored as INT8 codes with one scale per column. Biases,
products of two activations (attention) and convolutions stay as they are. TensorRT requires
zero-points of zero and scales above zero.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tiny_align.runtime.bundle.onnx_weights import (
    ReadWeight,
    copy_model,
    drop_unused_weights,
    quantise_columns,
    weight_products,
)

MAX_CODE = 127  # of INT8; -128 is not used
MAX_SAMPLES = 4096  # values per tensor and recording by which its scale is chosen
CLIPS = np.linspace(0.3, 1.0, 36)  # candidates for the range, as a share of the largest magnitude


def product_inputs(model: onnx.ModelProto) -> list[str]:
    """Names of the values that are multiplied by a weight (K, N), each once."""
    return list(dict.fromkeys(node.input[0] for node in weight_products(model.graph)))


def with_product_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with `product_inputs` as its outputs."""
    result = copy_model(model)
    del result.graph.output[:]
    for name in product_inputs(model):
        result.graph.output.append(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    return result


def find_scales(runs: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """The scale of each value: the one with the smallest squared rounding error on the recordings.

    Args:
        runs: for each recording, the values by name.
    """
    samples: dict[str, list[np.ndarray]] = {}
    largest: dict[str, float] = {}
    for run in runs:
        for name, array in run.items():
            magnitudes = np.abs(array).ravel()
            largest[name] = max(largest.get(name, 0.0), float(magnitudes.max()))
            step = -(-len(magnitudes) // MAX_SAMPLES)  # rounded up
            samples.setdefault(name, []).append(magnitudes[::step])
    scales = {}
    for name, magnitude_lists in samples.items():
        scales[name] = _find_scale(np.concatenate(magnitude_lists), largest[name])
    return scales


def _find_scale(magnitudes: np.ndarray, largest: float) -> float:
    candidates = CLIPS * (largest or 1.0) / MAX_CODE
    errors = []
    for scale in candidates:
        rounded = np.minimum(np.rint(magnitudes / scale), MAX_CODE) * scale
        errors.append(np.square(rounded - magnitudes).sum())
    from_the_widest = int(np.argmin(errors[::-1]))  # of equal errors the widest range
    return float(candidates[len(errors) - 1 - from_the_widest])


def to_int8(
    model: onnx.ModelProto, scales: dict[str, float], read_weight: ReadWeight
) -> onnx.ModelProto:
    """The graph with products of INT8 codes.

    Args:
        model: the FP32 graph; its weights may be in other files.
        scales: the scale of each of its `product_inputs`.
        read_weight: gives the values of one of its tensors, float32.
    """
    result = copy_model(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {node.output[0] for node in weight_products(model.graph)}
    dequantised: dict[str, str] = {}  # input of a product -> what takes its place
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in products:
            for index, name in enumerate(node.input):
                if name not in dequantised:
                    if index == 0:
                        added, constants = _quantise_activation(name, scales[name])
                    else:
                        added, constants = _quantise_weight(name, read_weight(weights[name]))
                    nodes.extend(added)
                    graph.initializer.extend(constants)
                    dequantised[name] = added[-1].output[0]
                node.input[index] = dequantised[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_weights(graph)
    return result


def _quantise_activation(
    name: str, scale: float
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that quantise a value and dequantise it again, and their constants."""
    quantised = f"{name}.quantised"
    parameters = [f"{name}.scale", f"{name}.zero"]
    nodes = [
        helper.make_node("QuantizeLinear", [name, *parameters], [quantised]),
        helper.make_node("DequantizeLinear", [quantised, *parameters], [f"{name}.dequantised"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), parameters[0]),
        numpy_helper.from_array(np.array(0, np.int8), parameters[1]),
    ]
    return nodes, constants


def _quantise_weight(
    name: str, weight: np.ndarray
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The node that dequantises a weight (K, N), and its codes, scales and zero-points."""
    codes, scales = quantise_columns(weight, bits=8)
    constants = [
        numpy_helper.from_array(codes, f"{name}.codes"),
        numpy_helper.from_array(scales, f"{name}.scales"),
        numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}.zeros"),
    ]
    inputs = [tensor.name for tensor in constants]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}.dequantised"], axis=1)
    return [node], constants
