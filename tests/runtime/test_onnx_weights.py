"""An ONNX graph's weights: where they are stored, their values, and the products that use them."""

import os

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="graphs are read with onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - needs the package above

from tiny_align.runtime.bundle.onnx_weights import (  # noqa: E402
    ALIGNMENT,
    Place,
    append_weight,
    copy_model,
    data_files,
    drop_unused_weights,
    find_place,
    load_graph,
    quantise_columns,
    read_weight,
    set_place,
    stored_bytes,
    weight_products,
)

WEIGHTS = {
    "matrix": np.arange(48, dtype=np.float32).reshape(6, 8),
    "bias": np.array([2.5], np.float32),
    "unused": np.zeros((3, 3), np.float32),
}


@pytest.fixture
def model():
    """x (n, 6) times a matrix, plus a bias, and times itself."""
    nodes = [
        helper.make_node("MatMul", ["x", "matrix"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("MatMul", ["sum", "sum"], ["square"]),
        helper.make_node("MatMul", ["square", "bias"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["n", "k"]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors))


@pytest.fixture
def stored(model, tmp_path):
    """Path of the graph with its matrices in a file beside it."""
    path = tmp_path / "graph.onnx"
    options = {"save_as_external_data": True, "location": "graph.onnx.data", "size_threshold": 16}
    onnx.save(copy_model(model), str(path), **options)
    return path


def test_values_are_the_same_in_the_graph_and_in_a_data_file(model, stored):
    for graph in (model, load_graph(stored)):
        for tensor in graph.graph.initializer:
            np.testing.assert_array_equal(
                read_weight(tensor, stored.parent), WEIGHTS[tensor.name], strict=True
            )


def test_a_data_file_with_hard_links_is_read(stored, tmp_path):
    os.link(tmp_path / "graph.onnx.data", tmp_path / "link")
    tensor = load_graph(stored).graph.initializer[0]
    np.testing.assert_array_equal(read_weight(tensor, tmp_path), WEIGHTS["matrix"])


def test_data_files_are_named_once_and_sorted(model, stored):
    assert data_files(model) == []
    graph = load_graph(stored)
    assert data_files(graph) == ["graph.onnx.data"]
    set_place(graph.graph.initializer[0], Place("another", 0, 192))
    assert data_files(graph) == ["another", "graph.onnx.data"]


def test_only_products_with_a_matrix_of_weights_are_found(model):
    assert [node.output[0] for node in weight_products(model.graph)] == ["product"]


def test_weights_that_no_node_reads_are_dropped(model):
    drop_unused_weights(model.graph)
    assert [tensor.name for tensor in model.graph.initializer] == ["matrix", "bias"]


def test_a_copy_leaves_the_original_unchanged(model):
    copy_model(model).graph.node[0].name = "changed"
    assert model.graph.node[0].name == ""


def test_an_appended_weight_is_aligned_and_found_again(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(6, 8))
    assert find_place(tensor) is None
    with open(tmp_path / "data", "wb") as data:
        data.write(b"other")
        pieces = [WEIGHTS["matrix"][:4], WEIGHTS["matrix"][4:]]
        place = append_weight(pieces, data, "data")
    assert place == Place("data", ALIGNMENT, 192)
    set_place(tensor, place)
    assert find_place(tensor) == place
    np.testing.assert_array_equal(read_weight(tensor, tmp_path), WEIGHTS["matrix"])


def test_a_place_without_a_length_has_the_tensors(stored):
    tensor = load_graph(stored).graph.initializer[0]
    length = next(entry for entry in tensor.external_data if entry.key == "length")
    tensor.external_data.remove(length)
    place = find_place(tensor)
    assert place is not None and place.length == WEIGHTS["matrix"].nbytes


@pytest.mark.parametrize(
    ("dtype", "n_bytes"),
    [(TensorProto.FLOAT, 60), (TensorProto.FLOAT16, 30), (TensorProto.INT4, 8)],
)
def test_stored_bytes_are_those_of_the_type(dtype, n_bytes):
    assert stored_bytes(TensorProto(data_type=dtype, dims=(3, 5))) == n_bytes


def test_codes_are_within_half_a_step():
    weight = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32)
    weight[:, 3] = 0
    weight[:, 4] = 1e-6
    codes, scales = quantise_columns(weight, 8)
    assert codes.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(codes.astype(int)).max() == 127
    assert (np.abs(codes * scales - weight) <= scales * 0.501).all() and not codes[:, 3].any()
