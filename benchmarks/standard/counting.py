"""What a graph must do at least, counted from its ONNX file: operations, and bytes moved.

ONNX Runtime runs the graph once on zeros and reports the shapes around every product, so every
dynamic size is known. Operations are those of matrix products and convolutions, two for a
multiplication and an addition; element-wise work is left out. Bytes are the weights as stored and
the graph's inputs and outputs, each once: what a machine must move whose caches hold everything in
between.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Gemm", "Conv")
SMALL = 64  # bytes: smaller constants are shapes and scalars

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Of one run of a graph."""

    operations: int
    weight_bytes: int
    other_bytes: int  # inputs and outputs

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.other_bytes

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"bytes": self.bytes}


class Value(NamedTuple):
    """What is known of a tensor in the graph."""

    shape: Shape
    n_bytes: int


def count(path: Path, sizes: dict[str, int]) -> Cost:
    """The cost of a graph whose dynamic dimensions have these sizes.

    Raises:
        ValueError: the graph has operators that are not ONNX's own; count the plain graph instead.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ValueError(
            f"{path} has {', '.join(sorted(foreign))}, whose operations are not known here: "
            "count the plain graph"
        )
    values = run_on_zeros(model, path.parent, sizes)
    weights = {value.name: tuple(value.dims) for value in model.graph.initializer}

    n_operations = 0
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            n_operations += operations(node, values, weights)
    weight_bytes = 0
    for weight in model.graph.initializer:
        n_bytes = stored_bytes(weight)
        if n_bytes >= SMALL:
            weight_bytes += n_bytes
    other_bytes = 0
    for value in (*model.graph.input, *model.graph.output):
        other_bytes += values[value.name].n_bytes
    return Cost(n_operations, weight_bytes, other_bytes)


def operations(node: "onnx.NodeProto", values: dict[str, Value], weights: dict[str, Shape]) -> int:
    """Two for every multiplication and addition of a product.

    Args:
        values: has those of the node's first input and of its output.
    """
    first = values[node.input[0]].shape
    out = values[node.output[0]].shape
    if node.op_type == "Conv":
        inner = int(np.prod(weights[node.input[1]][1:]))  # a group's channels, the kernel's sizes
    elif any(attribute.name == "transA" and attribute.i for attribute in node.attribute):
        inner = first[0]
    else:
        inner = first[-1]
    return 2 * int(np.prod(out)) * inner


def run_on_zeros(model: "onnx.ModelProto", folder: Path, sizes: dict[str, int]) -> dict[str, Value]:
    """The graph's inputs and outputs, its constants, and every product's first input and output.

    Constants count no bytes here: `stored_bytes` knows them.
    """
    import onnx
    import onnxruntime

    feed = {value.name: make_zeros(value.type.tensor_type, sizes) for value in model.graph.input}
    constants = {value.name: tuple(value.dims) for value in model.graph.initializer}
    known = {*feed, *constants, *(value.name for value in model.graph.output)}
    probes: set[str] = set()
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            probes.update((node.input[0], node.output[0]))

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    for name in sorted(probes - known):
        probed.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    arrays = dict(feed)
    arrays.update(zip(names, session.run(names, feed)))

    values = {name: Value(array.shape, array.nbytes) for name, array in arrays.items()}
    for name, shape in constants.items():
        values[name] = Value(shape, 0)
    return values


def make_zeros(tensor: "onnx.TypeProto.Tensor", sizes: dict[str, int]) -> np.ndarray:
    """An input of an ONNX tensor type."""
    import onnx

    shape = []
    for dimension in tensor.shape.dim:
        named = dimension.dim_param
        shape.append(sizes[named] if named else dimension.dim_value)
    return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def stored_bytes(weight: "onnx.TensorProto") -> int:
    """Of a constant, inside of the file or beside it; two INT4 values share a byte."""
    import onnx

    if weight.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        bits = 4
    else:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
    return int(np.prod(weight.dims)) * bits // 8
