"""The weights of an ONNX graph: their files, their values, and the products that use them.

Weights may be in the ONNX file or in files beside it (external data). Import this inside a
function where a command must start without onnx.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

ReadWeight = Callable[[onnx.TensorProto], np.ndarray]


def data_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files of a graph's external data, relative to the ONNX file and sorted."""
    names: set[str] = set()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            names.update(entry.value for entry in tensor.external_data if entry.key == "location")
    return sorted(names)


def read_weight(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The values of a tensor; those in another file are mapped, not read.

    onnx's own reader refuses an external file that has hard links.

    Args:
        folder: the folder of the ONNX file.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / entries["location"],
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r",
        offset=int(entries.get("offset", 0)),
        shape=tuple(tensor.dims),
    )


def weight_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The MatMuls whose second factor is a weight (K, N)."""
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def copy_model(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def drop_unused_weights(graph: onnx.GraphProto) -> None:
    """Remove the initialisers that no node reads."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
    used = [tensor for tensor in graph.initializer if tensor.name in names]
    del graph.initializer[:]
    graph.initializer.extend(used)
