"""The LLM's graph gives the top-k of its logits."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tiny_align.export.topk import TOPK, add_topk
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec


@pytest.fixture
def write_graph(tmp_path):
    """write_graph(V) -> a graph that gives its input as logits and as a key; its specification."""

    def write(size: int):
        shape, path = (1, 1, size), tmp_path / "llm.onnx"
        specs = [TensorSpec(name, "float32", shape) for name in ("x", "logits", "present.0.key")]
        x, *made = (
            helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in specs
        )
        nodes = [helper.make_node("Identity", ["x"], [value.name]) for value in made]
        graph = helper.make_graph(nodes, "llm", [x], made)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(model, str(path))
        return path, GraphSpec(path.name, "fp32", tuple(specs[:1]), tuple(specs[1:]))

    return write


def test_topk_is_sorted_and_other_outputs_are_unchanged(write_graph):
    path, spec = write_graph(1000)
    picked = add_topk(path, spec)
    names = ["logits", "best_logits", "best_tokens", "present.0.key"]
    assert [tensor.name for tensor in picked.outputs] == names
    x = np.random.default_rng(0).standard_normal((1, 1, 1000)).astype(np.float32)
    with load_runner(path, picked, "onnxruntime", 1) as runner:
        out = runner({"x": x})
    assert list(out) == names
    topk = np.argsort(-x, axis=-1)[..., :TOPK]
    np.testing.assert_array_equal(out["best_tokens"], topk)
    np.testing.assert_array_equal(out["best_logits"], np.take_along_axis(x, topk, -1))
    np.testing.assert_array_equal(out["present.0.key"], x)
    for tensor in picked.outputs:
        assert (out[tensor.name].dtype.name, out[tensor.name].shape) == (tensor.dtype, tensor.shape)


def test_small_vocabulary_gets_no_topk(write_graph):
    path, spec = write_graph(TOPK)
    before = path.read_bytes()
    assert add_topk(path, spec) == spec and path.read_bytes() == before


def test_shipped_llm_has_topk(bundle_path):
    model = onnx.load(str(bundle_path / "llm.onnx"), load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "TopK")
    assert list(node.output) == ["best_logits", "best_tokens"] and node.input[0] == "logits"
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    assert attributes == {"axis": -1, "largest": 1, "sorted": 1}  # as TensorRT 10.1 requires
