"""The shipped graphs, and the rungs made of them, use only what TensorRT's ONNX parser accepts.

The table is that of onnx-tensorrt's 10.1 release (tests/data), a lower bound for JetPack's
TensorRT 10.3: operators, and the types that each accepts.
"""

import json
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from tiny_align.engines import calibrate, fp16  # noqa: E402

TABLE = json.loads((Path(__file__).parents[1] / "data/tensorrt-10.1-operators.json").read_text())[
    "operators"
]
GRAPHS = ("encoder", "projector", "llm", "encoder in fp16", "encoder in int8", "llm in fp16")
NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}  # ONNX's where the table's differ
SIZE_FROM_DATA = {"NonZero", "NonMaxSuppression", "Unique", "Compress"}  # need an output allocator
FIRST_OUTPUT_ONLY = {"LayerNormalization", "Dropout"}


def zeros(tensor) -> np.ndarray:
    """Instead of weights: their values change no type."""
    return np.zeros(tensor.dims, np.float32)


@pytest.fixture(params=GRAPHS)
def graph(request, bundle_path):
    """A graph with the inferred type of every tensor."""
    name, _, precision = request.param.partition(" in ")
    model = onnx.load(str(bundle_path / f"{name}.onnx"), load_external_data=False)
    if precision == "int8":
        scales = dict.fromkeys(calibrate.product_inputs(model), 0.1)
        model = calibrate.to_int8(model, scales, zeros)
    if precision:
        model = fp16.to_fp16(model, zeros)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True).graph


def type_of_tensors(graph) -> dict[str, str]:
    """Tensor -> its type, as the table names it."""
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    names = {}
    for tensor, number in types.items():
        name = onnx.TensorProto.DataType.Name(number)
        names[tensor] = NAMES.get(name, name)
    return names


def refused(graph) -> list[str]:
    """Operators that are not in the table, or not with the type of their data."""
    types = type_of_tensors(graph)
    found = set()
    for node in graph.node:
        data = [*node.input, *node.output][0]
        if types[data] not in TABLE.get(node.op_type, ()):
            found.add(f"{node.op_type} of {types[data]}")
    return sorted(found)


def test_jetpacks_tensorrt_accepts_every_operator_with_its_type(graph):
    assert refused(graph) == []


def test_an_operator_or_type_that_is_not_accepted_is_found(graph):
    """Such as an operator of a newer opset, or a boolean one on other data."""
    graph.node[0].op_type = "BitwiseAnd"
    graph.node[-1].op_type = "And"
    assert len(refused(graph)) == 2


def test_sizes_depend_on_sizes_and_norms_give_one_output(graph):
    """What runtime/backends/tensorrt.py requires, and the notes of the table."""
    assert not SIZE_FROM_DATA & {node.op_type for node in graph.node}
    assert all(len(node.output) == 1 for node in graph.node if node.op_type in FIRST_OUTPUT_ONLY)
