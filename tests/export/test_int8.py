"""An encoder in INT8 by the command: for ONNX Runtime and for TensorRT, the weights stored once."""

from pathlib import Path

import numpy as np
import pytest

from tiny_align.engines.build import build_engines
from tiny_align.runtime import Assistant
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.backends.onnxruntime import quantised_activations
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph, read_weight

onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")
pytest.importorskip("transformers", reason="models are exported from transformers")

from tests.support.tiny_encoders import features, make_encoder  # noqa: E402
from tiny_align.benchmarks.studies.families import traced_once  # noqa: E402 - needs the packages above
from tiny_align.export.bundle import tensorrt_violations  # noqa: E402

RATE = 16_000  # Hz
FAMILIES = ("wav2vec2", "parakeet")
MIN_COSINE, MAX_COSINE = 0.99, 0.9999999  # to PyTorch's features: near them, but not the exact ones


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_llm, export, tmp_path_factory) -> tuple[str, Path, Bundle]:
    """(family, checkpoint, bundle)"""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_encoder(request.param, folder / "encoder")
    with traced_once("llm_graph", "projector_graph"):
        options = ("--precision", "fp32", "--encoder-precision", "int8", "--encoder-layers", 1, -1)
        exported = export({"encoder": source, "llm": tiny_llm}, folder / "bundle", *options)
    return request.param, source, exported.bundle


@pytest.fixture
def graphs(case) -> dict:
    """The standard graph and ONNX Runtime's, without their weights."""
    _, _, bundle = case
    return {b: load_graph(bundle.graph("encoder", b)) for b in (None, "onnxruntime")}


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_features_are_close_to_transformers(case, voice_path):
    family, source, bundle = case
    with Assistant.load(bundle, threads=1) as assistant:
        for path in sorted(voice_path.glob("test-*.flac"))[:3]:
            audio = read_audio(path, RATE)
            ours, exact = assistant.encode_window(audio), features(family, source, audio)
            cosine = np.vdot(ours, exact) / np.linalg.norm(ours) / np.linalg.norm(exact)
            assert ours.shape == exact.shape and MIN_COSINE < cosine < MAX_COSINE


def test_tensorrt_takes_the_graphs(case):
    _, _, bundle = case
    assert tensorrt_violations(bundle.path, bundle.manifest) == {}


def test_manifest_has_the_cosine_of_int8(case):
    standard = case[2].manifest.graphs["encoder"]
    ort = standard.on("onnxruntime")
    assert (standard.file, ort.file) == ("encoder.onnx", "encoder.ort.onnx")
    assert standard.on("tensorrt") == standard
    for spec in (standard, ort):
        assert spec.precision == "int8" and spec.file in case[2].manifest.files
        exact, cost = spec.parity["max_abs_diff_to_pytorch"], spec.parity["int8_cosine_to_pytorch"]
        assert exact.keys() == cost.keys() and max(exact.values()) < 1e-3
        assert all(MIN_COSINE < figure < MAX_COSINE for figure in cost.values())
    assert standard.parity != ort.parity


def test_manifest_says_how_activations_are_quantised(case):
    """And what it says is what is found in a graph whose manifest does not say it."""
    bundle = case[2]
    specs = bundle.manifest.graphs
    assert specs["projector"].quantised_activations == "none"
    for spec, activations in (
        (specs["encoder"], "none"),
        (specs["encoder"].on("onnxruntime"), "dynamic"),
    ):
        assert spec.quantised_activations == activations
        assert quantised_activations(bundle.path / spec.file) == activations


def test_weights_are_stored_once_in_int8(case, graphs):
    for model in graphs.values():
        stored = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in stored:
                assert stored[node.input[1]].data_type == onnx.TensorProto.INT8
        assert data_files(model) == ["encoder.onnx.data"]
    assert not (case[2].path / "encoder.ort.onnx.data").exists()


def test_sums_of_two_products_fit_16_bits(case):
    graph = case[2].graph("encoder", "onnxruntime")
    largest = []
    for tensor in load_graph(graph).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
            largest.append(np.abs(read_weight(tensor, graph.parent).astype(int)).max())
    assert largest and 2 * 255 * max(largest) < 2**15
    assert max(largest) == 63  # no bit is wasted


def test_only_onnx_runtimes_graph_multiplies_integers(graphs):
    standard = operators(graphs[None])
    ort = operators(graphs["onnxruntime"])
    n_weights = standard.count("DequantizeLinear")
    assert n_weights == ort.count("MatMulInteger") > 10 and "DequantizeLinear" not in ort
    assert "MatMulInteger" not in standard and "DynamicQuantizeLinear" not in standard
    assert 0 < ort.count("DynamicQuantizeLinear") < n_weights  # queries, keys, values: one input


def test_graph_has_no_mask_and_whole_norms(case, graphs):
    if (
        case[0] == "wav2vec2"
    ):  # Parakeet's attention has a bias by distance, which looks like a mask
        found = set(operators(graphs[None]))
        assert "InstanceNormalization" in found and not found & {"Where", "GroupNormalization"}


def test_tensorrt_builds_the_standard_graph(case):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU")
    pytest.importorskip("polygraphy")
    built = build_engines(case[2], compute_capability=86, graphs=["encoder"])
    assert built["encoder"]["precision"] == "int8" and built["encoder"]["bytes"] > 0


def test_unknown_encoder_precision_is_refused(run_cli, tmp_path):
    line = ("export", "--encoder", tmp_path, "--llm", tmp_path, "--out", tmp_path / "out")
    done = run_cli(*line, "--encoder-precision", "int4")
    assert done.status == 2 and "choose from" in done.stderr and not (tmp_path / "out").exists()
