"""Rewrites of an LLM's graphs: sibling products in one, scaled products in two, and equal weights in one file."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

ALIGNMENT = 64  # bytes; of a tensor in a data file


def pack_products(program: ir.Model) -> None:
    """Products of one value with several weights become one product and a split: queries, keys and values for one."""
    graph, siblings = program.graph, {}
    for node in graph:
        if (
            node.op_type == "MatMul"
            and node.inputs[1].const_value is not None
            and len(node.inputs[1].uses()) == 1
        ):
            siblings.setdefault(node.inputs[0], []).append(node)
    for nodes in siblings.values():
        if len(nodes) > 1:
            _pack(graph, nodes)


def _pack(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in nodes]
    widths = np.array([weight.shape[1] for weight in weights], np.int64)
    packed = make_initializer(
        graph,
        weights[0].name + ".packed",
        np.concatenate([w.const_value.numpy() for w in weights], 1),
    )
    sizes = make_initializer(graph, weights[0].name + ".widths", widths)
    product = ir.node("MatMul", [nodes[0].inputs[0], packed])
    split = ir.node(
        "Split", [product.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(nodes)
    )
    for value in (product.outputs[0], *split.outputs):
        value.dtype = weights[0].dtype
    graph.insert_before(nodes[0], [product, split])
    for node, part, weight in zip(nodes, split.outputs, weights):
        part.shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(part)
        graph.remove(node, safe=True)
        del graph.initializers[weight.name]


def split_scaled_products(program: ir.Model) -> None:
    """ONNX Runtime's products with a factor (Gemma 2's output layer and its cap) become a product and a factor.

    What is quantised is MatMul's weights.
    """
    graph = program.graph
    for node in list(graph):
        turned = any(node.attributes.get_int(f"trans{side}", 0) for side in "AB")
        if node.op_type != "FusedMatMul" or node.inputs[1].const_value is None or turned:
            continue
        out, alpha = node.outputs[0], np.array(node.attributes.get_float("alpha", 1.0), np.float32)
        product = ir.node("MatMul", node.inputs)
        factor = make_initializer(graph, f"{out.name}.factor", alpha)
        scaled = ir.node("Mul", [product.outputs[0], factor])
        for value in (product.outputs[0], scaled.outputs[0]):
            value.dtype, value.shape = out.dtype, out.shape
        graph.insert_before(node, [product, scaled])
        out.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def make_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def share_weights(keeper: Path, other: Path) -> None:
    """Point the tensors of the graph `other` that are in `keeper`'s data file, byte by byte, to that file.

    Both lie in one folder, each with its external data beside it in <name>.data; what only `other` has stays there.
    """
    kept = {
        _digest(blob): tensor.external_data
        for tensor, blob in _external(_load(keeper), keeper.parent)
    }
    model, path = _load(other), other.with_name(f"{other.name}.data")
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as own:
        for tensor, blob in _external(model, other.parent):
            place = kept.get(_digest(blob)) or _append(own, blob, path.name)
            del tensor.external_data[:]
            tensor.external_data.extend(place)
    partial.replace(path)
    if not path.stat().st_size:
        path.unlink()
    onnx.save(model, str(other))


def _load(graph: Path) -> onnx.ModelProto:
    return onnx.load(str(graph), load_external_data=False)


def _external(model: onnx.ModelProto, folder: Path):
    """Every tensor that lies in a data file, and its bytes there."""
    for tensor in model.graph.initializer:
        if place := {e.key: e.value for e in tensor.external_data}:
            offset, length = int(place.get("offset", 0)), int(place["length"])
            yield tensor, np.memmap(folder / place["location"], np.uint8, "r", offset, (length,))


def _digest(blob: np.ndarray) -> bytes:
    return hashlib.sha256(blob).digest()


def _append(file, blob: np.ndarray, name: str) -> list[onnx.StringStringEntryProto]:
    """Write the bytes to the end of an open data file; where they are now."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    place = {"location": name, "offset": file.tell(), "length": len(blob)}
    file.write(blob.data)
    return [onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()]
