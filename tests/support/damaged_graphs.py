"""An LLM's graph with one thing wrong, which parity must refuse."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tiny_align.runtime.bundle.onnx_weights import load_graph, read_weight, weight_products

Graph = onnx.GraphProto


def swap_weights(graph: Graph, folder: Path) -> None:
    """Give the first two products with weights of one shape each other's weight."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    seen: dict[tuple[int, ...], onnx.NodeProto] = {}
    for node in weight_products(graph):
        other = seen.setdefault(shapes[node.input[1]], node)
        if other is not node:
            weight = node.input[1]
            node.input[1] = other.input[1]
            other.input[1] = weight
            return
    raise AssertionError("no two weights have one shape")


def lose_gain(graph: Graph, folder: Path) -> None:
    """Make ones of the weight of the second layer's first norm."""
    (gain,) = [t for t in graph.initializer if t.name.endswith("layers.1.input_layernorm.weight")]
    graph.initializer.append(numpy_helper.from_array(np.ones(gain.dims, np.float32), "ones"))
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == gain.name:
                node.input[i] = "ones"


def shift_positions(graph: Graph, folder: Path) -> None:
    """Add one to every position; attention alone, which sees distances, would not show it."""
    _change_angles(graph, "Add", _frequencies(graph, folder))


def double_rotary_base(graph: Graph, folder: Path) -> None:
    """Rotate as with twice the base."""
    frequencies = _frequencies(graph, folder)
    exponents = np.arange(len(frequencies)) / len(frequencies)
    _change_angles(graph, "Mul", (2.0**-exponents).astype(np.float32))


DAMAGES = {
    "swapped weights": swap_weights,
    "a lost gain": lose_gain,
    "positions off by one": shift_positions,
    "twice the rotary base": double_rotary_base,
}


def damage(path: Path, name: str) -> Path:
    """Damage a copy of a graph, which shares its data file."""
    model = load_graph(path)
    DAMAGES[name](model.graph, path.parent)
    damaged = path.with_name(f"{name.replace(' ', '-')}.{path.name}")
    onnx.save(model, str(damaged))
    return damaged


def _frequencies(graph: Graph, folder: Path) -> np.ndarray:
    """(size / 2,) float32: radians per position of each pair of a head's channels."""
    (tensor,) = [t for t in graph.initializer if t.name.endswith("rotary_emb.inv_freq")]
    return read_weight(tensor, folder).ravel()


def _change_angles(graph: Graph, operator: str, constant: np.ndarray) -> None:
    """Put `operator` with a constant of all positions before the sine and the cosine."""
    (cosine,) = [node for node in graph.node if node.op_type == "Cos"]
    (sine,) = [node for node in graph.node if node.op_type == "Sin"]
    angles = cosine.input[0]
    assert sine.input[0] == angles
    (producer,) = [node for node in graph.node if angles in node.output]
    if producer.op_type == "Concat":  # the pairs' angles twice
        constant = np.concatenate([constant, constant])
    graph.initializer.append(numpy_helper.from_array(constant, "change"))
    changed = helper.make_node(operator, [angles, "change"], ["changed_angles"])
    graph.node.insert(list(graph.node).index(producer) + 1, changed)
    cosine.input[0] = "changed_angles"
    sine.input[0] = "changed_angles"
