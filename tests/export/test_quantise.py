"""Weights in fewer bits: positive scales, fused by ONNX Runtime, taken by TensorRT."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.bundle.tensorrt_rules import violations
from tiny_align.runtime.errors import TinyAlignError

onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("torch", reason="models are exported from torch")

from tiny_align.export.gguf_file import StoredBlocks  # noqa: E402
from tiny_align.export.quantise import quantise  # noqa: E402
from tiny_align.export.weight_forms import (  # noqa: E402
    Form,
    LlmWeights,
    dequantised,
    fitting_block,
    forms,
    join_blocks,
)
from tiny_align.runtime.bundle.onnx_weights import load_graph  # noqa: E402

COSTS = {  # precision -> min and max error, max share of the bytes of FP32
    "fp16": (0, 1e-3, 0.51),
    "int8": (0.005, 0.1, 0.3),
    "int4": (0.1, 0.8, 0.2),
}
PRODUCTS = 2 * 4 + 1  # of the LLM in conftest.py
LAYOUTS = ("tensorrt", "onnxruntime")


@pytest.fixture(scope="module")
def exact(tmp_path_factory, tiny_llm):
    """The tiny LLM's graph in FP32, and its specification."""
    from tiny_align.export.llms import llm_graph, load_llm

    path = tmp_path_factory.mktemp("exact") / "llm.onnx"
    return path, llm_graph(load_llm(str(tiny_llm))[0]).save(path)


def weight_graph(path, weight: np.ndarray):
    """x (1, n, K) times a weight in a data file."""
    rows, columns = weight.shape
    x = onnx.helper.make_tensor_value_info("x", 1, [1, "n", rows])
    y = onnx.helper.make_tensor_value_info("logits", 1, [1, "n", columns])
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["logits"])
    graph = onnx.helper.make_graph(
        [node], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(
        model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
    )


def stored_weight(path, n_inputs: int) -> np.ndarray:
    """(K, N): what the graph multiplies by, with exact products."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(n_inputs, dtype=np.float32)[None]})[0][0]


def random_weight(*shape: int) -> np.ndarray:
    return 0.02 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [Form(4), Form(8), Form(4, 128), Form(8, 64)])
@pytest.mark.parametrize("shape", [(128, 48), (192, 34), (96, 6), (128, 4098)])
def test_weights_are_within_two_steps_of_their_block(form, shape, layout, tmp_path):
    weight = random_weight(*shape)
    weight_graph(tmp_path / "exact.onnx", weight)
    quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", LlmWeights(form, form), layout)
    onnx.checker.check_model(str(tmp_path / "w.onnx"))
    blocks = [weight[i : i + 32] for i in range(0, len(weight), 32)]
    largest = [np.broadcast_to(np.abs(block).max(axis=0), block.shape) for block in blocks]
    if (
        fitting_block(len(weight), form.bits, form.block) > 32
    ):  # the largest of the whole weight is not less than that of any block
        largest = [np.broadcast_to(np.abs(weight).max(axis=0), weight.shape)]
    scales = np.concatenate(largest) / (2 ** (form.bits - 1) - 1)
    stored = stored_weight(tmp_path / "w.onnx", len(weight))
    # The search may cut off the farthest weight of a block, for the others' good.
    assert (np.abs(stored - weight) <= (2.2 if form.bits == 4 else 1.1) * scales).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [Form(4), Form(8)])
def test_tensorrts_rules_hold(form, layout, tmp_path):
    weight_graph(tmp_path / "exact.onnx", random_weight(128, 64))
    quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", LlmWeights(form, form), layout)
    found = violations(load_graph(tmp_path / "w.onnx"), tmp_path)
    assert bool(found) == (form.bits == 8 and layout == "onnxruntime"), found


def test_both_layouts_hold_the_same_numbers_in_8_bits(tmp_path):
    weight = random_weight(128, 64)
    weight_graph(tmp_path / "exact.onnx", weight)
    weights = LlmWeights(Form(8), Form(8))
    stored = []
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.onnx"
        quantise(tmp_path / "exact.onnx", path, weights, layout)
        stored.append(stored_weight(path, 128))
    np.testing.assert_allclose(stored[0], stored[1], rtol=0, atol=1e-7)
    assert np.abs(stored[0] - weight).max() < 0.02 * np.abs(weight).max()


@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(7, 16), (40, 16), (64, 5)])
def test_a_weight_that_no_blocks_fit_is_float16(n_inputs, n_outputs, tmp_path):
    weight = random_weight(n_inputs, n_outputs)
    weight_graph(tmp_path / "exact.onnx", weight)
    quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", LlmWeights(Form(4), Form(4)), "tensorrt")
    np.testing.assert_allclose(
        stored_weight(tmp_path / "w.onnx", n_inputs), weight, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_of_llama_cpp_keep_their_numbers(kind, layout, tmp_path):
    rng = np.random.default_rng(0)
    scales = (0.01 * rng.standard_normal((24, 2))).astype(np.float16)  # of any sign
    minima = None
    codes = rng.integers(-8, 8, (24, 64)).astype(np.int8)
    if kind == "Q4_1":
        minima = (0.05 * rng.standard_normal((24, 2))).astype(np.float16)
        codes += 8
    blocks = StoredBlocks(codes, scales, minima, 4)
    expected = codes * np.repeat(scales.astype(np.float32), 32, axis=1)
    if minima is not None:
        expected += np.repeat(minima.astype(np.float32), 32, axis=1)
    weight_graph(tmp_path / "exact.onnx", expected.T)
    weights = LlmWeights(Form(4), Form(4), stored={"w": blocks}.get)
    quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", weights, layout)
    assert not violations(load_graph(tmp_path / "w.onnx"), tmp_path)
    np.testing.assert_allclose(stored_weight(tmp_path / "w.onnx", 64), expected.T, atol=3e-7)


def test_a_block_of_one_value_keeps_it():
    """llama.cpp gives it the scale 0: a constant block in Q4_1, zeros in Q4_0."""
    scales = np.zeros((2, 1), np.float16)
    minima = np.float16([[0.25], [0]])
    codes = np.zeros((2, 32), np.int8)
    for part, expected in (
        (StoredBlocks(codes, scales, minima, 4), minima.astype(np.float32)),
        (StoredBlocks(codes + 3, scales, None, 4), np.zeros((2, 1), np.float32)),
    ):
        blocks = join_blocks([part])
        stored = dequantised(blocks)
        if blocks.minima is not None:
            stored = stored + blocks.minima
        np.testing.assert_array_equal(stored, np.repeat(expected, 32, axis=1).T)


def test_negative_scales_of_q8_0_are_rounded_anew():
    """No writer makes them; -128 times one has no code."""
    weight = random_weight(32, 2)
    blocks = StoredBlocks(np.full((2, 32), -128, np.int8), np.float16([[-1], [1]]), None, 8)
    found = LlmWeights(Form(8), Form(8), stored={"w": blocks}.get).get("w", weight, False)
    np.testing.assert_allclose(dequantised(found), weight, atol=0.01 * np.abs(weight).max())


def test_turned_blocks_fit_int4():
    scales = np.array([[-0.5]], np.float16)
    codes = np.arange(-8, 8, dtype=np.int8).repeat(2)[None]
    blocks = join_blocks([StoredBlocks(codes, scales, None, 4)])
    assert blocks.codes.min() == -8 and blocks.codes.max() == 7 and (blocks.scales > 0).all()
    np.testing.assert_array_equal(blocks.codes * 0.5 + blocks.minima, codes.T * -0.5)


def test_weight_beyond_float16_is_refused(tmp_path):
    weight_graph(tmp_path / "exact.onnx", np.full((64, 64), 1e5, np.float32))
    with pytest.raises(
        TinyAlignError, match="the LLM's weight w goes beyond float16: choose another --precision"
    ):
        weights = LlmWeights(*forms("fp16"))
        quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", weights, "tensorrt")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", COSTS)
def test_error_and_size_of_each_precision_are_bounded(precision, layout, exact, tmp_path):
    """Of the whole LLM, through the runtime's backend; its weights fit float16."""
    path, spec = exact
    target = tmp_path / "llm.onnx"
    min_error, max_error, share = COSTS[precision]
    quantise(path, target, LlmWeights(*forms(precision)), layout)
    feed = {}
    for tensor in spec.inputs:
        shape = [size if isinstance(size, int) else 0 for size in tensor.shape]
        feed[tensor.name] = np.zeros(shape, np.float32)
    embeddings = np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float32)
    feed["inputs_embeds"] = 0.2 * embeddings
    expected = load_runner(path, spec, "onnxruntime", 1)(feed)["logits"]
    got = load_runner(target, spec, "onnxruntime", 1)(feed)["logits"]
    error = np.sqrt(np.mean((got - expected) ** 2)) / expected.std()
    assert min_error <= error < max_error
    assert data_bytes(target) < share * data_bytes(path)


def data_bytes(path) -> int:
    return path.with_name(f"{path.name}.data").stat().st_size


@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("int4", 64), ("int8", 64)])
def test_onnxruntime_fuses_every_product(precision, block, exact, tmp_path):
    weights = LlmWeights(*forms(precision, None, block))
    quantise(exact[0], tmp_path / "llm.onnx", weights, "onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(str(tmp_path / "llm.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "fused.onnx")).graph.node]
    assert kinds.count("MatMulNBits") == PRODUCTS and "DequantizeLinear" not in kinds


@pytest.mark.parametrize("precision", COSTS)
def test_tensorrt_builds_every_precision(precision, exact, bundle_copy, run_cli):
    pytest.importorskip("polygraphy")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU")
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed: it builds on the GPU it builds for")
    path, spec = exact
    quantise(path, bundle_copy / "llm.onnx", LlmWeights(*forms(precision)), "tensorrt")
    manifest = Bundle.open(bundle_copy, verify=False).manifest
    graphs = {**manifest.graphs, "llm": dataclasses.replace(spec, precision=precision)}
    write_manifest(bundle_copy, dataclasses.replace(manifest, graphs=graphs))
    options = ("--graph", "llm", "--compute-capability", 86, "--json")
    done = run_cli("build-engines", "--bundle", bundle_copy, *options)
    assert done.status == 0, done.stderr
    assert done.document["engines"]["llm"]["precision"] == precision
