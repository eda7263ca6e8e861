"""Weights of an ONNX graph: where they are stored, their values, and the products that use them.

Small tensors are in the ONNX file itself. Large ones are in a file beside it ("external data"): the
graph holds the file's name, an offset and a length. Answering needs none of this; export, engines
and benchmarks do. onnx is imported inside the functions, as everywhere in the runtime.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 64  # bytes; of a tensor in a data file

ReadWeight = Callable[["onnx.TensorProto"], np.ndarray]


# --- graphs ---


def load_graph(path: Path) -> "onnx.ModelProto":
    """The graph without the weights in other files."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def copy_model(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy that may be changed."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def weight_products(graph: "onnx.GraphProto") -> list["onnx.NodeProto"]:
    """The MatMul nodes whose second factor is a weight (K, N)."""
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def drop_unused_weights(graph: "onnx.GraphProto") -> None:
    """Remove the initializers that no node reads."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
    used = [tensor for tensor in graph.initializer if tensor.name in names]
    del graph.initializer[:]
    graph.initializer.extend(used)


# --- where a tensor is stored ---


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are, outside of the ONNX file."""

    file: str  # relative to the folder of the ONNX file
    offset: int  # bytes
    length: int  # bytes


def find_place(tensor: "onnx.TensorProto") -> Place | None:
    """Where a tensor is stored; None if it is in the ONNX file itself."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries.get("length", stored_bytes(tensor)))
    return Place(entries["location"], int(entries.get("offset", 0)), length)


def set_place(tensor: "onnx.TensorProto", place: Place) -> None:
    """Point a tensor to its bytes in a data file."""
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=place.file)
    tensor.external_data.add(key="offset", value=str(place.offset))
    tensor.external_data.add(key="length", value=str(place.length))


def data_files(model: "onnx.ModelProto") -> list[str]:
    """Names of the files that a graph's weights are in, relative to the ONNX file and sorted."""
    files = set()
    for tensor in model.graph.initializer:
        place = find_place(tensor)
        if place is not None:
            files.add(place.file)
    return sorted(files)


def stored_bytes(tensor: "onnx.TensorProto") -> int:
    """Bytes of a tensor, in the ONNX file or beside it; two INT4 values share a byte."""
    import onnx

    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        bits = 4
    else:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-int(np.prod(tensor.dims)) * bits // 8)  # rounded up


# --- values ---


def read_bytes(place: Place, folder: Path) -> np.ndarray:
    """(length,) uint8: what is stored there, mapped and not read.

    Args:
        folder: of the ONNX file.
    """
    return np.memmap(folder / place.file, np.uint8, "r", place.offset, (place.length,))


def read_weight(tensor: "onnx.TensorProto", folder: Path) -> np.ndarray:
    """The values of a tensor; those in another file are mapped, not read.

    onnx's own reader refuses a data file that has hard links.

    Args:
        tensor: of a type with whole bytes; INT4 in another file is not unpacked.
        folder: of the ONNX file.
    """
    import onnx

    place = find_place(tensor)
    if place is None:
        return onnx.numpy_helper.to_array(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return read_bytes(place, folder).view(dtype).reshape(tuple(tensor.dims))


def append_weight(pieces: Iterable[np.ndarray], data: BinaryIO, file: str) -> Place:
    """Write a tensor to the end of an open data file, in pieces, and tell where it is now.

    Args:
        file: the name that the data file will have.
    """
    data.write(bytes(-data.tell() % ALIGNMENT))
    start = data.tell()
    for piece in pieces:
        data.write(np.ascontiguousarray(piece).data)
    return Place(file, start, data.tell() - start)


def quantise_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight (K, N) to integers with one scale per column.

    Returns:
        Codes (K, N) int8 and scales (N,) float32.
    """
    max_code = (1 << (bits - 1)) - 1
    scales = np.abs(weight).max(axis=0) / np.float32(max_code)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(weight / scales), -max_code - 1, max_code)
    return codes.astype(np.int8), scales
