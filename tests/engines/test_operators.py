"""The shipped graphs and the rungs made of them against what TensorRT's ONNX parser takes.

The table is that of onnx-tensorrt's 10.1 release (tests/data), a lower bound for JetPack's TensorRT 10.3: operators,
and the types that each takes.
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
NAMES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
}  # ONNX's -> the table's; the others are the same
SIZE_FROM_DATA = {
    "NonZero",
    "NonMaxSuppression",
    "Unique",
    "Compress",
}  # outputs that need an output allocator
FIRST_OUTPUT_ONLY = {"LayerNormalization", "Dropout"}


def zeros(tensor) -> np.ndarray:
    """In the place of weights, which change no type."""
    return np.zeros(tensor.dims, np.float32)


@pytest.fixture(params=GRAPHS)
def graph(request, bundle_path):
    """A graph with the type of every tensor worked out."""
    name, _, precision = request.param.partition(" in ")
    model = onnx.load(str(bundle_path / f"{name}.onnx"), load_external_data=False)
    if precision == "int8":
        scales = dict.fromkeys(calibrate.product_inputs(model), 0.1)
        model = calibrate.int8(model, scales, zeros)
    if precision:
        model = fp16.half(model, zeros)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True).graph


def type_of_tensors(graph) -> dict[str, str]:
    """Tensor -> its type, as the table names it."""
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in graph.initializer
    }
    named = {name: onnx.TensorProto.DataType.Name(t) for name, t in types.items()}
    return {name: NAMES.get(t, t) for name, t in named.items()}


def refused(graph) -> list[str]:
    """What the table does not take: operators, or the type of their data."""
    types = type_of_tensors(graph)
    given = (
        (node.op_type, types[(list(node.input) or list(node.output))[0]]) for node in graph.node
    )
    return sorted(
        {f"{operator} of {t}" for operator, t in given if t not in TABLE.get(operator, ())}
    )


def test_jetpacks_tensorrt_takes_every_operator_with_its_type(graph):
    assert refused(graph) == []


def test_an_operator_or_a_type_that_it_does_not_take_is_noticed(graph):
    """Drift would be: a boolean comparison, or an operator of a newer opset."""
    graph.node[0].op_type, graph.node[-1].op_type = "BitwiseAnd", "And"
    assert len(refused(graph)) == 2


def test_sizes_depend_on_sizes_and_norms_give_one_output(graph):
    """What runtime/backends/tensorrt.py relies on, and what the table adds in words."""
    assert not SIZE_FROM_DATA & {node.op_type for node in graph.node}
    assert all(len(node.output) == 1 for node in graph.node if node.op_type in FIRST_OUTPUT_ONLY)
