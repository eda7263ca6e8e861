"""What a graph must do at least, counted from its ONNX file: operations, and bytes moved.

The plain graph is run once by ONNX Runtime on zeros, with the sizes of its products for outputs: so every dynamic
size is known. Operations are those of matrix products and convolutions, two for a multiplication and an addition;
what is done to single values is left out. Bytes are the weights as stored and the graph's inputs and outputs, each
once: what a machine must move whose caches hold everything in between.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PRODUCTS = ("MatMul", "Gemm", "Conv")
SMALL = 64  # bytes: smaller constants are shapes and scalars


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


def count(path: Path, sizes: dict[str, int]) -> Cost:
    """The cost of a graph whose dynamic dimensions have these sizes.

    Only of standard operators: a bundle's plain graphs, not those with ONNX Runtime's own.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    foreign = sorted(
        {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    )
    if foreign:
        raise ValueError(
            f"{path} has {', '.join(foreign)}, whose operations are not known here: count the plain graph"
        )
    shapes = shapes_of_products(model, path.parent, sizes)
    weights = {value.name: tuple(value.dims) for value in model.graph.initializer}
    return Cost(
        operations=sum(
            operations(node, shapes, weights)
            for node in model.graph.node
            if node.op_type in PRODUCTS
        ),
        weight_bytes=sum(
            n for value in model.graph.initializer if (n := stored_bytes(value)) >= SMALL
        ),
        other_bytes=sum(
            shapes[name][1] for name in (v.name for v in (*model.graph.input, *model.graph.output))
        ),
    )


def operations(node, shapes: dict, weights: dict[str, tuple[int, ...]]) -> int:
    """Two for every multiplication and addition of a product; `shapes` has those of its first input and its output."""
    first, out = shapes[node.input[0]][0], shapes[node.output[0]][0]
    if node.op_type == "Conv":
        inner = int(
            np.prod(weights[node.input[1]][1:])
        )  # a group's channels, and the kernel's sizes
    elif any(a.name == "transA" and a.i for a in node.attribute):
        inner = first[0]
    else:
        inner = first[-1]
    return 2 * int(np.prod(out)) * inner


def shapes_of_products(
    model, folder: Path, sizes: dict[str, int]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of every product's first input and output, and of the graph's own, from a run on zeros."""
    import onnx
    import onnxruntime

    feed = {value.name: zeros(value.type.tensor_type, sizes) for value in model.graph.input}
    kept = {v.name for v in model.graph.output}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    wanted = (
        {name for node in products for name in (node.input[0], node.output[0])} - kept - set(feed)
    )
    constants = {v.name: tuple(v.dims) for v in model.graph.initializer}
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in sorted(wanted - constants.keys())
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = onnxruntime.InferenceSession(
        probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = feed | dict(zip(names, session.run(names, feed)))
    return {name: (value.shape, value.nbytes) for name, value in values.items()} | {
        name: (shape, 0) for name, shape in constants.items()
    }


def zeros(tensor, sizes: dict[str, int]) -> np.ndarray:
    """An input of an ONNX tensor type."""
    import onnx

    shape = [
        sizes[size.dim_param] if size.dim_param else size.dim_value for size in tensor.shape.dim
    ]
    return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def stored_bytes(value) -> int:
    """Of a constant, inside of the file or beside it; two INT4 values share a byte."""
    import onnx

    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}.get(value.data_type)
    bits = bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(value.data_type).itemsize
    return int(np.prod(value.dims)) * bits // 8
