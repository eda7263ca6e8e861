"""Weights of a graph while it is still an onnx_ir program, before it is saved.

The same for saved graphs: runtime/bundle/onnx_weights.py.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir


class WeightProduct(NamedTuple):
    """A MatMul whose second factor is a weight."""

    node: ir.Node
    factor: ir.Value  # (..., K)
    weight: ir.Value  # (K, N)


def weight_products(graph: ir.Graph) -> list[WeightProduct]:
    """The products with a weight (K, N), in the graph's order."""
    products = []
    for node in graph:
        if node.op_type != "MatMul":
            continue
        factor, weight = node.inputs
        if factor is None or weight is None or weight.const_value is None:
            continue
        if weight.shape is not None and len(weight.shape) == 2:
            products.append(WeightProduct(node, factor, weight))
    return products


def read_weight(weight: ir.Value) -> np.ndarray:
    """The values of a constant."""
    assert weight.const_value is not None
    return weight.const_value.numpy()


def add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant of the graph."""
    weight = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    weight.dtype = ir.DataType.from_numpy(array.dtype)
    weight.shape = ir.Shape(array.shape)
    graph.register_initializer(weight)
    return weight


def remove_weight(graph: ir.Graph, weight: ir.Value) -> None:
    """Drop a constant that no node reads any more."""
    assert weight.name is not None
    del graph.initializers[weight.name]
