"""The shipped graphs, and the rungs made of them, use only what TensorRT accepts.

The rules and the table of operators are those of runtime/bundle/tensorrt_rules.py.
"""

import pytest

onnx = pytest.importorskip("onnx")
from tiny_align.engines import calibrate, fp16  # noqa: E402
from tiny_align.runtime.bundle.bundle import Bundle  # noqa: E402
from tiny_align.runtime.bundle.onnx_weights import load_graph, read_weight  # noqa: E402
from tiny_align.runtime.bundle.profile import graph_profile  # noqa: E402
from tiny_align.runtime.bundle.tensorrt_rules import count_by_rule, violations  # noqa: E402

GRAPHS = ("encoder", "projector", "llm", "encoder in fp16", "encoder in int8", "llm in fp16")
SIZE_FROM_DATA = {"NonZero", "NonMaxSuppression", "Unique", "Compress"}  # need an output allocator
FIRST_OUTPUT_ONLY = {"LayerNormalization", "Dropout"}
QUANTISED: set[str] = set()  # of the LLM as it is shipped


@pytest.fixture(params=GRAPHS)
def made(request, bundle_path):
    """Name of a graph, and the graph."""
    name, _, precision = request.param.partition(" in ")
    model = load_graph(bundle_path / f"{name}.onnx")

    def read(tensor):
        return read_weight(tensor, bundle_path)

    if precision == "int8":
        scales = dict.fromkeys(calibrate.product_inputs(model), 0.1)
        model = calibrate.to_int8(model, scales, read)
    if precision:
        model = fp16.to_fp16(model, read)
    return name, model


@pytest.fixture
def graph(made):
    """The graph with the inferred type of every tensor."""
    return onnx.shape_inference.infer_shapes(made[1], strict_mode=True).graph


def broken_rules(made, folder) -> dict[str, int]:
    name, model = made
    manifest = Bundle.open(folder).manifest
    return count_by_rule(
        violations(model, folder, graph_profile(manifest.graphs[name], manifest.dims))
    )


def test_jetpacks_tensorrt_accepts_every_operator_with_its_type(made, bundle_path):
    """And breaks no other rule, but for the LLM's weights until it is exported anew."""
    allowed = QUANTISED if made[0] == "llm" else set()
    assert set(broken_rules(made, bundle_path)) == allowed


def test_an_operator_or_type_that_is_not_accepted_is_found(made, bundle_path):
    """Such as an operator of a newer opset, or a boolean one on other data."""
    before = broken_rules(made, bundle_path)
    nodes = made[1].graph.node
    nodes[0].op_type = "BitwiseAnd"
    nodes[-1].op_type = "And"
    after = broken_rules(made, bundle_path)
    assert (before.get("operator", 0), before.get("data type", 0)) == (0, 0)
    assert (after["operator"], after["data type"]) == (1, 1)


def test_sizes_depend_on_sizes_and_norms_give_one_output(graph):
    """What runtime/backends/tensorrt.py requires, and the notes of the table."""
    assert not SIZE_FROM_DATA & {node.op_type for node in graph.node}
    assert all(len(node.output) == 1 for node in graph.node if node.op_type in FIRST_OUTPUT_ONLY)
