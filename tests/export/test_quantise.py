"""Weights in fewer bits: equal to onnxruntime's, fused by ONNX Runtime, built by TensorRT."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.bundle.onnx_weights import quantise_columns
from tiny_align.runtime.errors import TinyAlignError

onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")
ort = pytest.importorskip("onnxruntime")

from tiny_align.export.quantise import Form, forms, quantise  # noqa: E402

COSTS = {  # precision -> min and max error, max share of the bytes of FP32
    "fp16": (0, 1e-3, 0.51),
    "int8": (0.005, 0.1, 0.3),
    "int4": (0.1, 0.8, 0.2),
}
PRODUCTS = 2 * 4 + 1  # of the LLM in conftest.py


@pytest.fixture(scope="module")
def exact(tmp_path_factory, tiny_llm):
    """The tiny LLM's graph in FP32, and its specification."""
    pytest.importorskip("torch", reason="models are exported from torch")
    from tiny_align.export.llms import llm_graph, load_llm

    path = tmp_path_factory.mktemp("exact") / "llm.onnx"
    return path, llm_graph(load_llm(str(tiny_llm))[0]).save(path)


def weight_graph(path, weight: np.ndarray):
    """x (n, K) times a weight in a data file."""
    rows, columns = weight.shape
    x = onnx.helper.make_tensor_value_info("x", 1, ["n", rows])
    y = onnx.helper.make_tensor_value_info("logits", 1, ["n", columns])
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


def product(path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_int4_codes_equal_onnxruntimes():
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    rows = np.random.default_rng(0).standard_normal((32, 500)).astype(np.float32)
    rows[:, 7] = 0
    config = DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ
    )
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(rows)
    unpacked = np.stack([packed.ravel() & 15, packed.ravel() >> 4], axis=1)
    theirs = unpacked.ravel().reshape(rows.shape).astype(np.int8)
    theirs = np.where(theirs > 7, theirs - 16, theirs)
    codes, ours = quantise_columns(rows, 4)
    np.testing.assert_allclose(np.delete(ours, 7), np.delete(scales.ravel(), 7), rtol=1e-6)
    assert np.mean(codes == theirs) > 0.999  # a tie may be rounded otherwise


@pytest.mark.parametrize("form", [Form(4), Form(8), Form(4, 128), Form(8, 64)])
@pytest.mark.parametrize(
    "shape", [(64, 48), (200, 33), (7, 5), (130, 4099)]
)  # blocks cut short, odd sizes, two tiles
def test_weights_are_within_a_step_of_their_block(form, shape, tmp_path):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight_graph(tmp_path / "exact.onnx", weight)
    quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", form, form)
    onnx.checker.check_model(str(tmp_path / "w.onnx"))
    blocks = [weight[i : i + form.block] for i in range(0, len(weight), form.block)]
    largest = [np.broadcast_to(np.abs(block).max(axis=0), block.shape) for block in blocks]
    scales = np.concatenate(largest) / (2 ** (form.bits - 1) - 1)
    stored = product(tmp_path / "w.onnx", np.eye(len(weight), dtype=np.float32))
    assert (np.abs(stored - weight) <= 1.01 * scales).all()


def test_weight_beyond_float16_is_refused(tmp_path):
    weight_graph(tmp_path / "exact.onnx", np.full((64, 64), 1e5, np.float32))
    with pytest.raises(
        TinyAlignError, match="the LLM's weight w goes beyond float16: choose another --precision"
    ):
        quantise(tmp_path / "exact.onnx", tmp_path / "w.onnx", *forms("fp16"))


@pytest.mark.parametrize("precision", COSTS)
def test_error_and_size_of_each_precision_are_bounded(precision, exact, tmp_path):
    """Of the whole LLM, through the runtime's backend; its weights fit float16."""
    path, spec = exact
    target = tmp_path / "llm.onnx"
    min_error, max_error, share = COSTS[precision]
    quantise(path, target, *forms(precision))
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


@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("int4", 64), ("int8", 128)])
def test_onnxruntime_fuses_every_product(precision, block, exact, tmp_path):
    quantise(exact[0], tmp_path / "llm.onnx", *forms(precision, None, block))
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
    quantise(path, bundle_copy / "llm.onnx", *forms(precision))
    manifest = Bundle.open(bundle_copy, verify=False).manifest
    graphs = {**manifest.graphs, "llm": dataclasses.replace(spec, precision=precision)}
    write_manifest(bundle_copy, dataclasses.replace(manifest, graphs=graphs))
    options = ("--graph", "llm", "--compute-capability", 86, "--json")
    done = run_cli("build-engines", "--bundle", bundle_copy, *options)
    assert done.status == 0, done.stderr
    assert done.document["engines"]["llm"]["precision"] == precision
