"""What TensorRT refuses: a small graph that breaks each rule and a twin that keeps it.

tests/data/llm-be35138 is the shipped LLM of commit be35138, cut down to one layer and the output
layer. Its codes are left out: the rules do not read them.
"""

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs are made with onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - needs the package above

from tiny_align.runtime.bundle.bundle import Bundle  # noqa: E402
from tiny_align.runtime.bundle.onnx_weights import (  # noqa: E402
    Place,
    load_graph,
    read_weight,
    set_place,
)
from tiny_align.runtime.bundle.profile import ShapeRange, graph_profile  # noqa: E402
from tiny_align.runtime.bundle.tensorrt_graph import parser_table  # noqa: E402
from tiny_align.runtime.bundle.tensorrt_rules import (  # noqa: E402
    PROFILE,
    RULES,
    count_by_rule,
    summary,
    violations,
)

EXTRACT = Path(__file__).parents[1] / "data/llm-be35138"
INPUTS = 64
OUTPUTS = 32
BLOCK = 32


# --- small graphs ---


def model(nodes, inputs, constants=(), outputs=("y",)):
    """A graph; inputs: name -> (type, shape), constants: name -> array or tensor."""
    values = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    tensors = []
    for name, value in dict(constants).items():
        if isinstance(value, TensorProto):
            tensors.append(value)
        else:
            tensors.append(numpy_helper.from_array(np.asarray(value), name))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "graph", values, results, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def on_floats(operator, shape=(2, 8), constants=(), outputs=("y",), **attributes):
    """One node on floats x of a shape and on constants."""
    node = helper.make_node(operator, ["x", *dict(constants)], outputs, **attributes)
    return model([node], {"x": (TensorProto.FLOAT, shape)}, constants, outputs)


def on_type(operator, data_type, **attributes):
    """One node on data of a type."""
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return model([node], {"x": (data_type, (2, 8))})


def dequantised(
    shape=(INPUTS, OUTPUTS), data_type=TensorProto.INT4, scales=None, zeros=None, **attributes
):
    """A product with dequantised weights, by default INT4 in blocks along the first axis."""
    if not attributes:
        attributes = {"axis": 0, "block_size": BLOCK}
    if scales is None:
        scales = np.full((INPUTS // BLOCK, OUTPUTS), 0.01, np.float32)
    codes = np.zeros(int(np.prod(shape)), np.int8)
    constants = {"codes": helper.make_tensor("codes", data_type, shape, codes), "scales": scales}
    if zeros is not None:
        constants["zeros"] = zeros
    nodes = [
        helper.make_node("DequantizeLinear", list(constants), ["weights"], **attributes),
        helper.make_node("MatMul", ["x", "weights"], ["y"]),
    ]
    return model(nodes, {"x": (TensorProto.FLOAT, (1, shape[-2]))}, constants)


def in_columns(zeros=None, n_scales=OUTPUTS, shape=(INPUTS, OUTPUTS), **attributes):
    """A product with INT8 weights and a scale per column."""
    scales = np.full(n_scales, 0.01, np.float32)
    attributes = attributes or {"axis": 1}
    return dequantised(shape, TensorProto.INT8, scales, zeros, **attributes)


def quantised_activation(scales, zeros=0, **attributes):
    """x through codes and back."""
    constants = {"scales": np.asarray(scales, np.float32), "zeros": np.asarray(zeros, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *constants], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", *constants], ["y"], **attributes),
    ]
    return model(nodes, {"x": (TensorProto.FLOAT, (1, 4))}, constants)


def quantised_weight(scales, **attributes):
    """As calibration tools write a weight: a constant that the graph itself quantises."""
    built = quantised_activation(scales, np.zeros(len(scales), np.int8), **attributes)
    del built.graph.input[:]
    built.graph.initializer.append(numpy_helper.from_array(np.ones((1, 4), np.float32), "x"))
    return built


def with_computed_scale(is_computed):
    scale = "computed" if is_computed else "scale"
    nodes = [
        helper.make_node("Abs", ["scale_in" if is_computed else "scale"], ["computed"]),
        helper.make_node("QuantizeLinear", ["x", scale, "zero"], ["y"]),
    ]
    constants = {"scale": np.float32(0.1), "zero": np.int8(0)}
    floats = TensorProto.FLOAT
    inputs = {"x": (floats, (2, 8)), "scale_in": (floats, ())}
    return model(nodes, inputs, constants)


def with_computed_zero(is_computed):
    zero = "zero_in" if is_computed else "zero"
    node = helper.make_node("DequantizeLinear", ["codes", "scale", zero], ["y"])
    inputs = {"codes": (TensorProto.INT8, (2, 8)), "zero_in": (TensorProto.INT8, ())}
    return model([node], inputs, {"scale": np.float32(0.1), "zero": np.int8(0)})


def blocks_of(is_constant):
    """INT4 codes in blocks that are a constant, or an input."""
    built = dequantised()
    if not is_constant:
        codes = built.graph.initializer[0]
        value = helper.make_tensor_value_info(codes.name, codes.data_type, codes.dims)
        built.graph.initializer.remove(codes)
        built.graph.input.append(value)
    return built


def quantised_to(data_type):
    node = helper.make_node("QuantizeLinear", ["x", "scale"], ["y"], output_dtype=data_type)
    return model([node], {"x": (TensorProto.FLOAT, (2, 8))}, {"scale": np.float32(0.1)})


def squeezed(is_constant):
    axes = "axes" if is_constant else "axes_in"
    node = helper.make_node("Squeeze", ["x", axes], ["y"])
    inputs = {"x": (TensorProto.FLOAT, (1, 8)), "axes_in": (TensorProto.INT64, (1,))}
    return model([node], inputs, {"axes": np.array([0])})


def branch(operator):
    """An operator inside a branch."""
    node = helper.make_node(operator, ["x"], ["z"])
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 8))
    body = helper.make_graph([node], "body", [], [value])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    return model([choice], {"c": (TensorProto.BOOL, ()), "x": (TensorProto.FLOAT, (2, 8))})


def topk(number=4, shape=(1, 4000), **attributes):
    constants = {"number": np.array([number])}
    return on_floats("TopK", shape, constants, ("y", "indices"), **attributes)


def norm(*outputs):
    constants = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    return on_floats("LayerNormalization", (2, 8), constants, outputs)


def scales(*shape, value=0.01):
    return np.full(shape, value, np.float32)


def one_scale(value):
    """Scales that are legal but for the last one."""
    array = scales(INPUTS // BLOCK, OUTPUTS)
    array[-1, -1] = value
    return array


CASES = {  # what is wrong -> its rule, a graph that breaks it, a twin that keeps it
    "an unknown operator": ("operator", on_floats("BitwiseNot"), on_floats("Neg")),
    "an operator of another domain": (
        "operator",
        on_floats("Gelu", domain="com.microsoft"),
        on_floats("Gelu"),
    ),
    "an operator that ONNX does not have": ("operator", on_floats("Gelu2"), on_floats("Gelu")),
    "an unknown operator in a branch": ("operator", branch("Det"), branch("Neg")),
    "data of another type": (
        "data type",
        on_type("Sqrt", TensorProto.DOUBLE),
        on_type("Sqrt", TensorProto.FLOAT16),
    ),
    "a cast to another type": (
        "data type",
        on_type("Cast", TensorProto.FLOAT, to=TensorProto.INT8),
        on_type("Cast", TensorProto.FLOAT, to=TensorProto.INT32),
    ),
    "UINT4 weights": (
        "data type",
        dequantised(data_type=TensorProto.UINT4, scales=scales(1), axis=0),
        dequantised(data_type=TensorProto.INT4, scales=scales(1), axis=0),
    ),
    "the mean of a LayerNormalization": ("first output", norm("y", "mean"), norm("y")),
    "computed axes": ("constant input", squeezed(False), squeezed(True)),
    "a computed scale": ("constant scale", with_computed_scale(True), with_computed_scale(False)),
    "a negative scale": (
        "positive scale",
        dequantised(scales=one_scale(-1e-3)),
        dequantised(scales=one_scale(1e-3)),
    ),
    "a scale of zero": ("positive scale", dequantised(scales=one_scale(0)), dequantised()),
    "a scale that is no number": (
        "positive scale",
        dequantised(scales=one_scale(np.nan)),
        dequantised(),
    ),
    "a scale that FP16 rounds to zero": (
        "positive scale",
        dequantised(scales=one_scale(1e-8).astype(np.float16)),
        dequantised(scales=one_scale(1e-8)),
    ),
    "a negative scale of INT8": (
        "positive scale",
        quantised_activation(-0.1),
        quantised_activation(0.1),
    ),
    "a zero point that is not zero": (
        "zero point",
        in_columns(zeros=np.eye(1, OUTPUTS, dtype=np.int8)[0]),
        in_columns(zeros=np.zeros(OUTPUTS, np.int8)),
    ),
    "one zero point for many scales": (
        "zero point",
        in_columns(zeros=np.int8(0)),
        in_columns(zeros=np.zeros(OUTPUTS, np.int8)),
    ),
    "a computed zero point": ("zero point", with_computed_zero(True), with_computed_zero(False)),
    "codes of UINT8": (
        "type of codes",
        quantised_to(TensorProto.UINT8),
        quantised_to(TensorProto.INT8),
    ),
    "too few scales": ("shape of scales", in_columns(n_scales=INPUTS, axis=1), in_columns()),
    "too many rows of scales": (
        "shape of scales",
        dequantised(scales=scales(4, OUTPUTS)),
        dequantised(scales=scales(2, OUTPUTS)),
    ),
    "no axis": (
        "written axis",
        in_columns(shape=(OUTPUTS, OUTPUTS), axis=None),
        in_columns(shape=(OUTPUTS, OUTPUTS)),
    ),
    "channels of an activation": (
        "channels of weights",
        quantised_activation([0.1] * 4, np.zeros(4, np.int8), axis=1),
        quantised_weight([0.1] * 4, axis=1),
    ),
    "INT8 in blocks": ("type in blocks", dequantised(data_type=TensorProto.INT8), in_columns()),
    "blocks of a 3-D constant": (
        "blocks of weights",
        dequantised((2, INPUTS, OUTPUTS), scales=scales(2, 2, OUTPUTS), axis=1, block_size=BLOCK),
        dequantised(),
    ),
    "blocks of computed codes": ("blocks of weights", blocks_of(False), blocks_of(True)),
    "a size that the block does not divide": (
        "whole blocks",
        dequantised((96, OUTPUTS), scales=scales(2, OUTPUTS), axis=0, block_size=64),
        dequantised((96, OUTPUTS), scales=scales(3, OUTPUTS), axis=0, block_size=32),
    ),
    "an odd number of INT4 columns": (
        "even rows of INT4",
        dequantised((INPUTS, 33), scales=scales(2, 33)),
        dequantised((INPUTS, 34), scales=scales(2, 34)),
    ),
    "an unsorted TopK": ("sorted TopK", topk(sorted=0), topk(sorted=1)),
    "the first axis of five": (
        "axis of TopK",
        topk(shape=(4, 4, 1, 1, 1), axis=0),
        topk(shape=(4, 4, 1, 1, 1), axis=1),
    ),
    "a K of 3,840": ("K of TopK", topk(3840), topk(3839)),
    "a K above the dimension": ("K of TopK", topk(5, (1, 4)), topk(4, (1, 4))),
}


@pytest.mark.parametrize(("rule", "broken", "legal"), CASES.values(), ids=CASES)
def test_a_graph_breaks_exactly_its_rule_and_its_twin_none(rule, broken, legal, tmp_path):
    assert set(count_by_rule(violations(broken, tmp_path))) == {rule}
    assert violations(legal, tmp_path) == []


def test_every_rule_has_a_case():
    assert {rule for rule, _, _ in CASES.values()} == {rule.name for rule in RULES}


def test_a_single_block_may_be_shorter_than_the_block_size(tmp_path):
    """TensorRT infers its size from the shapes."""
    short = dequantised((48, OUTPUTS), scales=scales(1, OUTPUTS), axis=0, block_size=128)
    assert violations(short, tmp_path) == []


def test_a_value_in_a_constant_node_is_a_constant(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Squeeze", ["x", "axes"], ["y"]),
    ]
    assert violations(model(nodes, {"x": (TensorProto.FLOAT, (1, 8))}), tmp_path) == []


def test_a_violation_names_node_rule_and_both_sides(tmp_path):
    graph = topk(5000)
    graph.graph.node[0].name = "best"
    (found,) = violations(graph, tmp_path)
    assert str(found) == "best breaks the rule 'K of TopK': expected K up to 3839, got 5000"


@pytest.mark.parametrize(("byte", "rules"), [(b"\0", {}), (b"\1", {"zero point": 1})])
def test_zero_points_of_int4_are_read_from_another_file(byte, rules, tmp_path):
    shape = (INPUTS // BLOCK, OUTPUTS)
    n_bytes = INPUTS // BLOCK * OUTPUTS // 2
    zeros = TensorProto(name="zeros", data_type=TensorProto.INT4, dims=shape)
    set_place(zeros, Place("weights", 0, n_bytes))
    (tmp_path / "weights").write_bytes(byte * n_bytes)
    assert count_by_rule(violations(dequantised(zeros=zeros), tmp_path)) == rules


# --- profiles ---

DYNAMIC = topk(4, ("rows", 4000), axis=0)
PROFILES = {  # what is wrong -> min, opt and max of x, the size of the second dimension
    "opt above max": ((4, 4000), (9, 4000), (8, 4000)),
    "min above opt": ((6, 4000), (5, 4000), (8, 4000)),
    "another static size": ((4, 3999), (5, 3999), (8, 3999)),
    "another number of dimensions": ((4,), (5,), (8,)),
}


@pytest.mark.parametrize("bounds", PROFILES.values(), ids=PROFILES)
def test_a_profile_out_of_order_is_found(bounds, tmp_path):
    (found,) = violations(DYNAMIC, tmp_path, {"x": ShapeRange(*bounds)})
    assert (found.node, found.rule) == ("input 'x'", PROFILE)


def test_a_negative_min_is_found(tmp_path):
    profile = {"x": ShapeRange((-1, 4000), (5, 4000), (8, 4000))}
    found = violations(DYNAMIC, tmp_path, profile)
    assert set(count_by_rule(found)) == {PROFILE, "K of TopK"}


def test_an_input_without_a_profile_and_a_profile_without_an_input_are_found(tmp_path):
    profile = {"z": ShapeRange((1,), (1,), (1,))}
    found = violations(DYNAMIC, tmp_path, profile)
    assert [violation.node for violation in found] == ["input 'x'", "input 'z'"]


@pytest.mark.parametrize(("min_size", "rules"), [(3, {"K of TopK": 1}), (4, {})])
def test_k_is_no_more_than_the_dimension_has_at_its_min(min_size, rules, tmp_path):
    profile = {"x": ShapeRange((min_size, 4000), (5, 4000), (8, 4000))}
    assert count_by_rule(violations(DYNAMIC, tmp_path, profile)) == rules


# --- versions ---


def test_a_version_has_the_newest_table_up_to_it():
    oldest = parser_table()
    assert parser_table("8.6.1") == parser_table("10.3.0") == oldest
    newer = parser_table("10.16.0.72")
    assert newer == parser_table("11.0") == parser_table("10.15")
    assert oldest.block_types == ["INT4"]
    assert set(newer.block_types) > {"INT4"} and "INT8" not in newer.block_types


def test_an_operator_of_a_newer_version_is_refused_for_the_older_one(tmp_path):
    """Pow of integers is in the table of 10.15."""
    graph = on_type("Pow", TensorProto.INT32)
    graph.graph.node[0].input.append("x")
    assert count_by_rule(violations(graph, tmp_path)) == {"data type": 1}
    assert violations(graph, tmp_path, version="10.16") == []


# --- the shipped bundle ---


@pytest.mark.parametrize("name", ["encoder", "projector"])
def test_the_shipped_encoder_and_projector_break_no_rule(bundle_path, name):
    bundle = Bundle.open(bundle_path)
    profile = graph_profile(bundle.manifest.graphs[name], bundle.manifest.dims)
    assert violations(load_graph(bundle.graph(name)), bundle.path, profile) == []


@pytest.mark.parametrize("version", ["10.3.0", "10.16.0"])
def test_the_llm_shipped_at_be35138_is_refused(version):
    found = violations(load_graph(EXTRACT / "llm.onnx"), EXTRACT, version=version)
    assert count_by_rule(found) == {"positive scale": 4, "type in blocks": 1}
    assert "3080 of 6144 that are not, down to -0.0285515" in summary(found)
    assert "DequantizeLinear to 'val_689' breaks the rule 'type in blocks'" in summary(found)


def test_it_is_legal_with_positive_scales_and_an_output_layer_in_int4():
    graph = load_graph(EXTRACT / "llm.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name.endswith(".scales"):
            values = np.abs(read_weight(tensor, EXTRACT))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        if tensor.data_type == TensorProto.INT8:
            tensor.data_type = TensorProto.INT4
    assert violations(graph, EXTRACT) == []
