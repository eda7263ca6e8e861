"""Weights of a graph while it is still an onnx_ir program, before it is saved.

The same for saved graphs: runtime/bundle/onnx_weights.py.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch

TRANSPOSED = ".T"  # ends the name of a parameter (N, K) that a product reads as (K, N)
JOINT = "+"  # between the names of weights that are side by side in one


class WeightProduct(NamedTuple):
    """A MatMul whose second factor is a weight."""

    node: ir.Node
    factor: ir.Value  # (..., K)
    weight: ir.Value  # (K, N)


class JoinedTensor(ir.LazyTensor):
    """Weights (K, N) side by side. They are joined when they are read, so they need no memory."""

    def __init__(self, arrays: Sequence[np.ndarray], name: str):
        rows, width = len(arrays[0]), sum(array.shape[1] for array in arrays)
        super().__init__(
            lambda: ir.tensor(np.concatenate(arrays, axis=1), name=name),
            dtype=ir.DataType.from_numpy(arrays[0].dtype),
            shape=ir.Shape([rows, width]),
            name=name,
        )


def name_weights(graph: ir.Graph, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Name the weights that are a module's parameters after them, those that are views of them too.

    The exporter numbers the transposed ones, differently in every graph.
    """
    views: dict[tuple, str] = {}
    for name, parameter in parameters:
        array = parameter.detach().numpy()
        views[_view(array)] = name
        if array.ndim == 2:
            views[_view(array.T)] = name + TRANSPOSED
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.size <= 1:
            continue
        found = views.get(_view(read_weight(value)))
        if found is not None and found not in graph.initializers:
            value.name = found


def _view(array: np.ndarray) -> tuple:
    """What memory an array is, and how it is laid out."""
    address = array.__array_interface__["data"][0]
    strides = [step for step, size in zip(array.strides, array.shape) if size > 1]
    return address, array.shape, tuple(strides), array.dtype


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


def add_joined_weight(graph: ir.Graph, weights: Sequence[ir.Value]) -> ir.Value:
    """A new constant of the graph: weights (K, N) side by side."""
    name = JOINT.join(str(weight.name) for weight in weights)
    joined = JoinedTensor([read_weight(weight) for weight in weights], name)
    value = ir.Value(name=name, const_value=joined)
    value.dtype = joined.dtype
    value.shape = ir.Shape(joined.shape)
    graph.register_initializer(value)
    return value


def remove_weight(graph: ir.Graph, weight: ir.Value) -> None:
    """Drop a constant that no node reads any more."""
    assert weight.name is not None
    del graph.initializers[weight.name]
