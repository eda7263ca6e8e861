"""Rewrites of graphs: sibling products joined, scaled products split, equal weights stored once."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from tiny_align.export.program_weights import (
    WeightProduct,
    add_joined_weight,
    add_weight,
    read_weight,
    remove_weight,
    weight_products,
)
from tiny_align.runtime.bundle.onnx_weights import (
    Place,
    append_weight,
    find_place,
    load_graph,
    read_bytes,
    set_place,
)


def pack_products(program: ir.Model) -> None:
    """Compute products of one value with several weights as one product and a split.

    The queries, keys and values of a layer are such siblings, and its gate and up projections.
    """
    siblings: dict[ir.Value, list[WeightProduct]] = {}
    for product in weight_products(program.graph):
        if len(product.weight.uses()) == 1:
            siblings.setdefault(product.factor, []).append(product)
    for products in siblings.values():
        if len(products) > 1:
            _pack(program.graph, products)


def _pack(graph: ir.Graph, products: list[WeightProduct]) -> None:
    first = products[0]
    weights = [product.weight for product in products]
    widths = np.array([read_weight(weight).shape[1] for weight in weights], np.int64)
    packed = add_joined_weight(graph, weights)
    sizes = add_weight(graph, f"{first.weight.name}.widths", widths)
    product = ir.node("MatMul", [first.factor, packed])
    split = ir.node(
        "Split", [product.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(products)
    )
    for value in (product.outputs[0], *split.outputs):
        value.type = first.weight.type
    graph.insert_before(first.node, [product, split])
    for sibling, part in zip(products, split.outputs):
        output = sibling.node.outputs[0]
        part.shape = output.shape
        output.replace_all_uses_with(part)
        graph.remove(sibling.node, safe=True)
        remove_weight(graph, sibling.weight)


def split_scaled_products(program: ir.Model) -> None:
    """Replace ONNX Runtime's products with a factor by a product and a multiplication.

    Gemma 2's output layer and its cap are fused so, and only the weights of a MatMul are quantised.
    """
    graph = program.graph
    for node in list(graph):
        if node.op_type != "FusedMatMul":
            continue
        if any(node.attributes.get_int(name, 0) for name in ("transA", "transB")):
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue
        output = node.outputs[0]
        alpha = np.array(node.attributes.get_float("alpha", 1.0), np.float32)
        product = ir.node("MatMul", node.inputs)
        factor = add_weight(graph, f"{output.name}.factor", alpha)
        scaled = ir.node("Mul", [product.outputs[0], factor])
        for value in (product.outputs[0], scaled.outputs[0]):
            value.type = output.type
            value.shape = output.shape
        graph.insert_before(node, [product, scaled])
        output.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def share_weights(keeper: Path, other: Path) -> None:
    """Store the weights that two graphs have in common once, in the data file of `keeper`.

    Weights are equal if their bytes are. Both graphs are in one folder, each with its data file
    <name>.data beside it. Weights that only `other` has stay in its own data file, which is removed
    if none is left.
    """
    folder = keeper.parent
    places: dict[bytes, Place] = {}
    for tensor in load_graph(keeper).graph.initializer:
        place = find_place(tensor)
        if place is not None:
            places[_digest(place, folder)] = place
    model = load_graph(other)
    path = other.with_name(f"{other.name}.data")
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as data:
        for tensor in model.graph.initializer:
            place = find_place(tensor)
            if place is None:
                continue
            shared = places.get(_digest(place, folder))
            if shared is None:
                shared = append_weight([read_bytes(place, folder)], data, path.name)
            set_place(tensor, shared)
    partial.replace(path)
    if not path.stat().st_size:
        path.unlink()
    onnx.save(model, str(other))


def _digest(place: Place, folder: Path) -> bytes:
    return hashlib.sha256(read_bytes(place, folder).data).digest()
