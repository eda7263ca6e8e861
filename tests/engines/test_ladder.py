"""The precision ladder: rungs' graphs, their error on real audio, and which one is selected.

With the shipped encoder and LLM on the shipped recordings, and small graphs with known outputs.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest

from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.engines.ladder import AUTO, OWN, RUNGS, Ladder
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.engines.select_precision import Selection, select_precision, try_rungs
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import check_engine
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec, write_manifest
from tiny_align.runtime.errors import AudioError, BackendError, TinyAlignError
from tiny_align.runtime.files import sha256
from tiny_align.runtime.llm import Decoding, LanguageModel

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tiny_align.engines import calibrate, fp16, measure  # noqa: E402

SIZE = 8


@pytest.fixture(scope="session")
def recordings(voice_path):
    """Three to calibrate, three to measure."""
    return tuple(sorted(voice_path.glob("test-*.flac"))[:6])


@pytest.fixture(scope="module")
def bundle(bundle_path, tmp_path_factory):
    """A copy, whose weights get links: onnx loads no file that has any."""
    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(
        bundle_path, folder, ignore=shutil.ignore_patterns("users", "engines"), dirs_exist_ok=True
    )
    yield Bundle.open(folder)
    shutil.rmtree(folder)


def model_of(nodes, weights: dict):
    """x -> y, both (1, n, SIZE)."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, "n", SIZE))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, "n", SIZE))
    tensors = []
    for name, weight in weights.items():
        tensors.append(numpy_helper.from_array(np.asarray(weight, np.float32), name))
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, tmp_path, x):
    onnx.checker.check_model(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    spec = GraphSpec(path.name, "fp32", (TensorSpec("x", "float32", (1, "n", SIZE)),), ())
    with OrtRunner(path, spec, 1) as runner:
        return runner({"x": np.asarray(x, np.float32)})["y"]


def types_of(model) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def normed(rng):
    """A product, a norm in its single operators, a softmax."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Pow", ["h", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axes"], ["mean"]),
        helper.make_node("Add", ["mean", "epsilon"], ["guarded"]),
        helper.make_node("Sqrt", ["guarded"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["factor"]),
        helper.make_node("Mul", ["h", "factor"], ["normal"]),
        helper.make_node("Softmax", ["normal"], ["y"]),
    ]
    model = model_of(nodes, {"w": rng.standard_normal((SIZE, SIZE)), "two": 2.0, "epsilon": 1e-6})
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "axes"))
    return model


def test_products_are_fp16_and_norms_and_softmax_are_not(tmp_path):
    model = normed(np.random.default_rng(0))
    rewritten = fp16.to_fp16(model, numpy_helper.to_array)
    types = types_of(rewritten)
    in_fp16 = {name for name, kind in types.items() if kind == TensorProto.FLOAT16}
    assert {"h", "normal", "w.half"} <= in_fp16
    assert not {"x", "y", "squares", "mean", "guarded", "root", "factor"} & in_fp16
    assert "w" not in types, "the FP32 weight must not stay in the graph"
    x = np.random.default_rng(1).standard_normal((1, 5, SIZE))
    np.testing.assert_allclose(run(rewritten, tmp_path, x), run(model, tmp_path, x), atol=2e-3)


def test_twin_rounds_as_fp16(tmp_path):
    """Compared with numpy's float16; ONNX Runtime would not compute the graph in it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "k"], ["y"]),
    ]
    weight = np.eye(SIZE) * 1.2345678
    x = np.random.default_rng(0).standard_normal((1, 5, SIZE)).astype(np.float32)
    model = model_of(nodes, {"w": weight, "k": 3.1415926})
    rounded = (x.astype(np.float16) @ weight.astype(np.float16)) * np.float16(3.1415926)
    np.testing.assert_array_equal(run(fp16.twin(model), tmp_path, x), rounded.astype(np.float32))
    assert np.abs(run(model, tmp_path, x) - rounded).max() > 1e-4


def overflowing():
    """Exact in FP32; in FP16 it is infinite between its two products."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["y"]),
    ]
    return model_of(nodes, {"up": np.eye(SIZE) * 1e4, "down": np.eye(SIZE) * 1e-4})


def test_value_beyond_fp16_gives_cosine_0(tmp_path):
    x = np.full((1, 2, SIZE), 50.0)
    model = overflowing()
    np.testing.assert_allclose(run(model, tmp_path, x), x, rtol=1e-5)
    assert not np.isfinite(run(fp16.twin(model), tmp_path, x)).all()
    assert measure.cosine(run(fp16.twin(model), tmp_path, x), x) == 0


def test_scales_fit_the_recordings():
    """Evenly spread values use all codes; one outlier among many does not set the range."""
    even = np.linspace(-2, 2, 1000, dtype=np.float32)
    many = np.append(np.random.default_rng(0).standard_normal(4000).astype(np.float32), 30)
    runs = [{"even": even, "many": many}, {"even": even / 2, "many": many}]
    scales = calibrate.find_scales(runs)
    assert scales["even"] == pytest.approx(2 / 127)
    assert 9 / 127 <= scales["many"] < 30 / 127
    assert calibrate.find_scales([{"nothing": np.zeros(5, np.float32)}])["nothing"] > 0


def test_int8_is_symmetric_by_column_and_keeps_biases(tmp_path):
    weight = np.random.default_rng(0).standard_normal((SIZE, SIZE)) * np.logspace(-3, 3, SIZE)
    weight[:, 3] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "b": np.ones(SIZE)})
    x = np.random.default_rng(1).standard_normal((1, 50, SIZE)).astype(np.float32)
    scales = calibrate.find_scales([{"x": x}])
    rewritten = calibrate.to_int8(model, scales, numpy_helper.to_array)
    tensors = {t.name: numpy_helper.to_array(t) for t in rewritten.graph.initializer}
    assert tensors["w.codes"].dtype == tensors["x.zero"].dtype == np.int8 and "w" not in tensors
    assert tensors["x.zero"] == 0
    assert tensors["w.scales"].shape == (SIZE,) and (tensors["w.scales"] > 0).all()
    np.testing.assert_array_equal(tensors["b"], np.ones(SIZE, np.float32))
    for node in rewritten.graph.node:
        if "Linear" in node.op_type:
            zero_points = tensors[node.input[2]]
            assert not zero_points.any()
    outputs = run(rewritten, tmp_path, x)
    exact = x @ weight + 1
    assert measure.cosine(outputs, exact) > 0.9995
    assert np.abs(outputs - exact)[..., 0].max() < 0.05


@pytest.mark.parametrize("precision", RUNGS["encoder"])
def test_encoder_on_real_audio_is_within_its_bound(bundle, recordings, tmp_path, precision):
    selection = try_rungs(bundle, "encoder", Ladder(recordings, precision), tmp_path)
    assert selection.precision == precision
    (found,) = selection.accuracy.values()
    assert found["bound"] <= found["cosine"] < 1 and found["bound"] == RUNGS["encoder"][precision]
    own_bytes = (bundle.path / "encoder.onnx.data").stat().st_size
    assert selection.graph.stat().st_size < 0.6 * own_bytes
    assert not list(tmp_path.glob("*twin*")) and not list(tmp_path.glob("watched*"))


@pytest.fixture
def strict_int8_bound(monkeypatch):
    """Bounds that FP16 keeps and INT8 does not."""
    monkeypatch.setitem(RUNGS, "encoder", {"int8": 0.99999, "fp16": 0.999})


def test_next_rung_is_selected_if_one_is_beyond_its_bound(
    bundle, recordings, tmp_path, strict_int8_bound
):
    selection = try_rungs(bundle, "encoder", Ladder(recordings, AUTO), tmp_path)
    assert selection.precision == "fp16" and list(selection.accuracy) == ["int8", "fp16"]
    assert selection.accuracy["int8"]["cosine"] < selection.accuracy["int8"]["bound"]


def test_own_graph_is_selected_if_fp16_overflows(bundle, recordings, tmp_path):
    """The encoder's first convolution goes beyond FP16's range, its second one back."""
    (tmp_path / "wild").mkdir()
    graph = measure.SourceGraph(bundle, "encoder", tmp_path / "wild")
    factors = {
        "encoder.subsampling.layers.0.weight": 1e6,
        "encoder.subsampling.layers.0.bias": 1e6,
        "encoder.subsampling.layers.2.weight": 1e-6,
    }
    for tensor in graph.model.graph.initializer:
        if tensor.name in factors:
            values = graph.read_weight(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    graph.write(graph.model, "encoder.onnx")
    wild = dataclasses.replace(bundle, path=tmp_path / "wild")
    (tmp_path / "work").mkdir()
    selection = try_rungs(wild, "encoder", Ladder(recordings, AUTO), tmp_path / "work")
    assert (selection.precision, selection.graph) == ("fp32", tmp_path / "wild/encoder.onnx")
    assert list(selection.accuracy) == ["int8", "fp16"]
    for found in selection.accuracy.values():
        assert found["cosine"] < 0.1  # infinities, or clipped values
    message = r"'encoder' in fp16 has a cosine of 0\.0.*0\.999.*--precision auto or fp32"
    with pytest.raises(BackendError, match=message):
        try_rungs(wild, "encoder", Ladder(recordings, "fp16"), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.onnx"))


def test_llm_keeps_its_weights_and_computes_in_fp16(bundle, recordings, tmp_path):
    selection = try_rungs(bundle, "llm", Ladder(recordings[:2], AUTO), tmp_path)
    assert selection.precision == "int4/fp16" and selection.accuracy["fp16"]["cosine"] >= 0.999
    model = onnx.load(selection.graph, load_external_data=False)
    kinds = types_of(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert {kinds[node.input[0]] for node in products} == {TensorProto.FLOAT16}
    assert kinds["inputs_embeds"] == kinds["logits"] == kinds["present.0.key"] == TensorProto.FLOAT


def test_plain_decoder_answers_as_the_deployed_one(assistant):
    bundle = assistant.bundle
    with PlainDecoder(bundle.graph("llm"), bundle.manifest.graphs["llm"], 1) as decoder:
        llm = LanguageModel(bundle, decoder)
        for text in ("play quiet music in the office", "six five six two one"):
            prompt = llm.assemble(llm.embed(llm.encode_words(text)))
            answer = list(assistant.llm.generate(prompt, Decoding()))
            assert list(llm.generate(prompt, Decoding())) == answer and len(answer) > 2


def test_own_graphs_are_selected_without_a_request(bundle, tmp_path):
    for name, graph in bundle.manifest.graphs.items():
        selection = select_precision(bundle, name, Ladder(), tmp_path)
        assert selection == Selection(bundle.graph(name), graph.precision, None)
    assert Ladder(("a.wav",), AUTO).rungs("projector", "fp32") == {}
    assert list(Ladder(("a.wav",), AUTO).rungs("encoder", "int8")) == ["fp16"]


@pytest.mark.parametrize(
    ("data", "precision", "message"),
    [
        (
            None,
            "int8",
            "--precision int8 is measured on recordings: give a folder of them with --data",
        ),
        (None, "fp8", "expected a --precision of auto, fp32, int8, fp16, got fp8"),
        ("one", None, "got 1: give a folder with more"),
        ("gone", AUTO, "got 0: give a folder with more"),
    ],
)
def test_request_that_cannot_be_measured_is_refused(
    run_cli, bundle_path, voice_path, tmp_path, data, precision, message
):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "one").mkdir()
    shutil.copyfile(voice_path / "test-100.flac", tmp_path / "one/a.flac")
    options = ["--data", tmp_path / data] if data else []
    options += ["--precision", precision] if precision else []
    done = run_cli("build-engines", "--bundle", bundle_path, *options)
    assert done.status == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert Ladder.of(None, OWN) == Ladder.of(None) == Ladder()


def test_a_recording_that_cannot_be_used_is_named(bundle, recordings, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF no audio")
    ladder = Ladder((*recordings[:1], tmp_path / "noise.wav"), AUTO)
    with pytest.raises(AudioError, match=r"noise\.wav"):
        try_rungs(bundle, "encoder", ladder, tmp_path)


def test_no_graph_is_left_half_written(bundle, recordings, tmp_path, full_disk):
    with full_disk(500_000), pytest.raises(TinyAlignError, match="cannot be written"):
        try_rungs(bundle, "encoder", Ladder(recordings[:2], "fp16"), tmp_path)
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*"))


def test_weights_left_by_a_killed_build_are_replaced(bundle, tmp_path):
    graph = measure.SourceGraph(bundle, "encoder", tmp_path)
    (tmp_path / "encoder.onnx.data").write_bytes(b"another bundle's")
    graph.write(graph.model, "encoder.fp16.onnx")
    assert (tmp_path / "encoder.onnx.data").samefile(bundle.path / "encoder.onnx.data")


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_measurement_is_reported_in_one_sentence(bundle, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_align.engines.select_precision.try_rungs", kill)
    with pytest.raises(
        BackendError, match=r"measuring the graph 'encoder' was killed.*memory.*--precision fp32"
    ):
        select_precision(bundle, "encoder", Ladder(recordings, AUTO), tmp_path)


# ---- with a real builder ----


@pytest.fixture
def rtx():
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed: it builds on the GPU it builds for")
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU"
    )


def test_every_rung_builds_and_is_accepted(rtx, bundle_copy, recordings, capfd):
    """Also prints the sizes of the engines and the seconds of their builds."""
    bundle = Bundle.open(bundle_copy)
    facts = find_builder(86).facts
    built = {}
    for precision in ("int8", "fp16"):
        graphs = [name for name, rungs in RUNGS.items() if precision in rungs]
        ladder = Ladder(recordings, precision)
        entries = build_engines(bundle, compute_capability=86, graphs=graphs, ladder=ladder)
        for name in graphs:
            engine = check_engine(bundle, name, facts)
            assert engine.stat().st_size == entries[name]["bytes"]
        built[precision] = entries
    assert built["int8"]["encoder"]["precision"] == "int8"
    assert built["fp16"]["llm"]["precision"] == "int4/fp16"
    int8_sha256 = built["int8"]["encoder"]["built_sha256"]
    assert int8_sha256 != built["fp16"]["encoder"]["built_sha256"]
    with capfd.disabled():
        for name, entry in itertools.chain(built["int8"].items(), built["fp16"].items()):
            size = f"{entry['bytes'] / 1e6:.1f} MB"
            print(f"\n{name} {entry['precision']}: {size} in {entry['seconds']:.1f} s", end="")


FAKE = """
import json, pathlib, sys
job = json.load(sys.stdin)
pathlib.Path(job["engine"]).write_bytes(pathlib.Path(job["graph"]).read_bytes())
print(json.dumps({"seconds": 0.0, "peak_memory_bytes": 1}))
"""


@pytest.fixture
def fake_build(monkeypatch):
    """A builder that copies graphs as engines, and a selection that measures nothing.

    Returns the list of graphs for which a rung was selected.
    """
    import sys

    from tiny_align.engines import process

    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", FAKE))
    selected = []

    def select_fp16(bundle, name, ladder, folder):
        own = bundle.manifest.graphs[name].precision
        if not ladder.rungs(name, own):
            return select_precision(bundle, name, ladder, folder)
        selected.append(name)
        rung = folder / f"{name}.rung.onnx"
        onnx.save(helper.make_model(helper.make_graph([], "rung", [], [])), str(rung))
        return Selection(rung, "fp16", {"fp16": {"cosine": 0.9999, "bound": 0.999}})

    monkeypatch.setattr("tiny_align.engines.build.select_precision", select_fp16)
    return selected


def test_selection_is_recorded_and_not_repeated(fake_build, bundle_copy, recordings):
    bundle = Bundle.open(bundle_copy)
    first = build_engines(bundle, ladder=Ladder(recordings, AUTO))
    folder = next((bundle_copy / "engines").iterdir())
    stored = json.loads((folder / "engine.json").read_text())["graphs"]["encoder"]
    assert stored == first["encoder"]
    assert stored["accuracy"] == {"fp16": {"cosine": 0.9999, "bound": 0.999}}
    assert stored["built_sha256"] == sha256(folder / "encoder.engine") != stored["graph_sha256"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "encoder.engine",
        "engine.json",
        "llm.engine",
        "projector.engine",
    ]
    assert fake_build == ["encoder", "llm"]
    assert build_engines(bundle, ladder=Ladder(recordings, AUTO)) == build_engines(bundle) == first
    assert fake_build == ["encoder", "llm"], "the same request, or none, must rebuild nothing"
    build_engines(bundle, ladder=Ladder(recordings[:4], AUTO))
    assert fake_build == ["encoder", "llm"] * 2, "other recordings are another request"
    assert build_engines(bundle, ladder=Ladder())["encoder"]["precision"] == "fp32"
    assert fake_build == ["encoder", "llm"] * 2


def test_killed_build_continues_with_its_selections(
    fake_build, bundle_copy, recordings, monkeypatch
):
    from tiny_align.engines import build

    bundle = Bundle.open(bundle_copy)
    real = build.run_build

    def die_at_the_llm(name, job, report):
        if name == "llm":
            raise KeyboardInterrupt
        return real(name, job, report)

    monkeypatch.setattr(build, "run_build", die_at_the_llm)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ladder=Ladder(recordings, AUTO))
    monkeypatch.setattr(build, "run_build", real)
    build_engines(bundle, ladder=Ladder(recordings, AUTO))
    assert fake_build == ["encoder", "llm", "llm"]


def test_changed_weights_make_the_engine_of_a_rung_stale(fake_build, bundle_copy, recordings):
    facts = find_builder().facts
    build_engines(Bundle.open(bundle_copy), ladder=Ladder(recordings, AUTO))
    with open(bundle_copy / "encoder.onnx.data", "r+b") as weights:
        weights.write(b"\xff\xff\xff")
    engines = bundle_copy.parent / "engines"
    shutil.move(bundle_copy / "engines", engines)
    write_manifest(bundle_copy, Bundle.open(bundle_copy, verify=False).manifest)
    shutil.move(engines, bundle_copy / "engines")
    with pytest.raises(BackendError, match=r"from another encoder\.onnx\.data"):
        check_engine(Bundle.open(bundle_copy), "encoder", facts)
