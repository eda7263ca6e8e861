"""The precision ladder: rungs' graphs, their measure on real audio, and which of them becomes the engine.

The shipped encoder and LLM on the shipped recordings; small graphs of known answers beside them.
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

from tiny_align.engines import ladder as ladder_module
from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.engines.ladder import AUTO, OWN, RUNGS, Choice, Ladder, choose
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import check_engine
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec, write_manifest
from tiny_align.runtime.errors import AudioError, BackendError, TinyAlignError
from tiny_align.runtime.files import sha256
from tiny_align.runtime.llm import Decoding, LanguageModel

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tiny_align.engines import calibrate, fp16, select_precision  # noqa: E402

SIZE = 8


@pytest.fixture(scope="session")
def recordings(voice_path):
    """Three to calibrate, three to measure."""
    return tuple(sorted(voice_path.glob("test-*.flac"))[:6])


@pytest.fixture(scope="module")
def bundle(bundle_path, tmp_path_factory):
    """A copy: graphs that are made of it are beside links to its weights, and onnx loads no file that has links."""
    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(
        bundle_path, folder, ignore=shutil.ignore_patterns("users", "engines"), dirs_exist_ok=True
    )
    yield Bundle.open(folder)
    shutil.rmtree(folder)


def model_of(nodes, weights: dict, **shapes):
    """x -> y, both (1, n, SIZE) unless told otherwise."""
    x, y = shapes.get("x", (1, "n", SIZE)), shapes.get("y", (1, "n", SIZE))
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x), ("y", y))
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()
    ]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
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
    values = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    return values | {t.name: t.data_type for t in graph.initializer}


def normed(rng):
    """A product, a norm written out in its parts, a product of that, a softmax."""
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


def test_products_are_halves_and_norms_and_softmax_are_not(tmp_path):
    model = normed(np.random.default_rng(0))
    made = fp16.half(model, numpy_helper.to_array)
    types = types_of(made)
    halved = {name for name, kind in types.items() if kind == TensorProto.FLOAT16}
    assert {"h", "normal", "w.half"} <= halved
    assert not {"x", "y", "squares", "mean", "guarded", "root", "factor"} & halved
    assert "w" not in types, "the FP32 weight must not stay in the graph"
    x = np.random.default_rng(1).standard_normal((1, 5, SIZE))
    np.testing.assert_allclose(run(made, tmp_path, x), run(model, tmp_path, x), atol=2e-3)


def test_the_twin_rounds_as_halves_do(tmp_path):
    """Against numpy's float16; ONNX Runtime does not compute the graph itself in it."""
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


def test_a_value_beyond_halves_is_seen(tmp_path):
    x, model = np.full((1, 2, SIZE), 50.0), overflowing()
    np.testing.assert_allclose(run(model, tmp_path, x), x, rtol=1e-5)
    assert not np.isfinite(run(fp16.twin(model), tmp_path, x)).all()
    assert select_precision.cosine(run(fp16.twin(model), tmp_path, x), x) == 0


def test_scales_are_those_of_the_recordings():
    """Evenly spread values fill the codes; one far outlier among many does not take the range."""
    even = np.linspace(-2, 2, 1000, dtype=np.float32)
    many = np.append(np.random.default_rng(0).standard_normal(4000).astype(np.float32), 30)
    found = calibrate.scales([{"even": even, "many": many}, {"even": even / 2, "many": many}])
    assert found["even"] == pytest.approx(2 / 127)
    assert 9 / 127 <= found["many"] < 30 / 127
    assert calibrate.scales([{"nothing": np.zeros(5, np.float32)}])["nothing"] > 0


def test_int8_is_symmetric_by_column_and_keeps_biases(tmp_path):
    weight = np.random.default_rng(0).standard_normal((SIZE, SIZE)) * np.logspace(-3, 3, SIZE)
    weight[:, 3] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "b": np.ones(SIZE)})
    x = np.random.default_rng(1).standard_normal((1, 50, SIZE)).astype(np.float32)
    made = calibrate.int8(model, calibrate.scales([{"x": x}]), numpy_helper.to_array)
    tensors = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    assert tensors["w.codes"].dtype == tensors["x.zero"].dtype == np.int8 and "w" not in tensors
    assert (
        tensors["x.zero"] == 0
        and tensors["w.scales"].shape == (SIZE,)
        and (tensors["w.scales"] > 0).all()
    )
    np.testing.assert_array_equal(tensors["b"], np.ones(SIZE, np.float32))
    zero_points = {n.op_type: list(n.input[2:]) for n in made.graph.node if "Linear" in n.op_type}
    assert not any(tensors[name].any() for names in zero_points.values() for name in names)
    got, exact = run(made, tmp_path, x), x @ weight + 1
    assert select_precision.cosine(got, exact) > 0.9995 and np.abs(got - exact)[..., 0].max() < 0.05


@pytest.mark.parametrize("precision", RUNGS["encoder"])
def test_the_encoder_on_real_audio_is_within_its_bound(bundle, recordings, tmp_path, precision):
    choice = select_precision.climb(bundle, "encoder", Ladder(recordings, precision), tmp_path)
    assert choice.precision == precision
    (found,) = choice.accuracy.values()
    assert found["bound"] <= found["cosine"] < 1 and found["bound"] == RUNGS["encoder"][precision]
    assert (
        choice.graph.stat().st_size
        < 0.6 * bundle.graph("encoder").with_name("encoder.onnx.data").stat().st_size
    )
    assert not list(tmp_path.glob("*twin*")) and not list(tmp_path.glob("watched*"))


@pytest.fixture
def far_apart(monkeypatch):
    """Bounds that INT8 breaks and FP16 keeps."""
    monkeypatch.setitem(RUNGS, "encoder", {"int8": 0.99999, "fp16": 0.999})


def test_the_next_rung_is_taken_where_one_breaks_its_bound(bundle, recordings, tmp_path, far_apart):
    choice = select_precision.climb(bundle, "encoder", Ladder(recordings, AUTO), tmp_path)
    assert choice.precision == "fp16" and list(choice.accuracy) == ["int8", "fp16"]
    assert choice.accuracy["int8"]["cosine"] < choice.accuracy["int8"]["bound"]


def test_a_graph_that_goes_wrong_in_halves_stays_as_it_is(bundle, recordings, tmp_path):
    """The encoder's first convolution beyond FP16's range, and its second one back."""
    (tmp_path / "wild").mkdir()
    graph, first = (
        select_precision.Graph(bundle, "encoder", tmp_path / "wild"),
        "encoder.subsampling.layers.0",
    )
    factors = {
        f"{first}.weight": 1e6,
        f"{first}.bias": 1e6,
        "encoder.subsampling.layers.2.weight": 1e-6,
    }
    for tensor in graph.model.graph.initializer:
        if tensor.name in factors:
            values = graph.values(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    graph.write(graph.model, "encoder.onnx")
    wild = dataclasses.replace(bundle, path=tmp_path / "wild")
    (tmp_path / "work").mkdir()
    choice = select_precision.climb(wild, "encoder", Ladder(recordings, AUTO), tmp_path / "work")
    assert (choice.precision, choice.graph) == ("fp32", tmp_path / "wild/encoder.onnx")
    assert (
        max(found["cosine"] for found in choice.accuracy.values()) < 0.1
    )  # infinities, or what is left of them
    with pytest.raises(
        BackendError,
        match=r"'encoder' in fp16 has a cosine of 0\.0.*0\.999.*--precision auto or fp32",
    ):
        select_precision.climb(wild, "encoder", Ladder(recordings, "fp16"), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.onnx"))


def test_the_llm_keeps_its_weights_and_computes_in_halves(bundle, recordings, tmp_path):
    choice = select_precision.climb(bundle, "llm", Ladder(recordings[:2], AUTO), tmp_path)
    assert choice.precision == "int4/fp16" and choice.accuracy["fp16"]["cosine"] >= 0.999
    model = onnx.load(choice.graph, load_external_data=False)
    kinds = types_of(model)
    assert {kinds[n.input[0]] for n in model.graph.node if n.op_type == "MatMul"} == {
        TensorProto.FLOAT16
    }
    assert kinds["inputs_embeds"] == kinds["logits"] == kinds["present.0.key"] == TensorProto.FLOAT


def test_the_plain_graph_answers_as_the_deployed_one(assistant):
    bundle = assistant.bundle
    with PlainDecoder(bundle.graph("llm"), bundle.manifest.graphs["llm"], 1) as decoder:
        llm = LanguageModel(bundle, decoder)
        for text in ("play quiet music in the office", "six five six two one"):
            prompt = llm.assemble(llm.embed(llm.encode_words(text)))
            answer = list(assistant.llm.generate(prompt, Decoding()))
            assert list(llm.generate(prompt, Decoding())) == answer and len(answer) > 2


def test_nothing_is_chosen_where_nothing_was_asked(bundle, tmp_path):
    for name, graph in bundle.manifest.graphs.items():
        assert choose(bundle, name, Ladder(), tmp_path) == Choice(
            bundle.graph(name), graph.precision, None
        )
    assert Ladder(("a.wav",), AUTO).rungs("projector", "fp32") == {}
    assert list(Ladder(("a.wav",), AUTO).rungs("encoder", "int8")) == ["fp16"]


@pytest.mark.parametrize(
    ("data", "precision", "said"),
    [
        (
            None,
            "int8",
            "--precision int8 is measured on recordings: give a folder of them with --data",
        ),
        (None, "fp8", "--precision is fp8: choose one of auto, fp32, int8, fp16"),
        ("one", None, "holds 1 recordings"),
        ("gone", AUTO, "holds 0 recordings"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run_cli, bundle_path, voice_path, tmp_path, data, precision, said
):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "one").mkdir()
    shutil.copyfile(voice_path / "test-100.flac", tmp_path / "one/a.flac")
    given = ["--data", tmp_path / data] if data else []
    given += ["--precision", precision] if precision else []
    done = run_cli("build-engines", "--bundle", bundle_path, *given)
    assert done.status == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert Ladder.of(None, OWN) == Ladder.of(None) == Ladder()


def test_a_recording_that_cannot_be_used_is_named(bundle, recordings, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF no audio")
    with pytest.raises(AudioError, match=r"noise\.wav"):
        select_precision.climb(
            bundle, "encoder", Ladder((*recordings[:1], tmp_path / "noise.wav"), AUTO), tmp_path
        )


def test_no_graph_is_left_half_written(bundle, recordings, tmp_path, full_disk):
    with full_disk(500_000), pytest.raises(TinyAlignError, match="cannot be written"):
        select_precision.climb(bundle, "encoder", Ladder(recordings[:2], "fp16"), tmp_path)
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*"))


def test_weights_that_a_killed_build_left_are_not_taken(bundle, tmp_path):
    graph = select_precision.Graph(bundle, "encoder", tmp_path)
    (tmp_path / "encoder.onnx.data").write_bytes(b"another bundle's")
    graph.write(graph.model, "encoder.fp16.onnx")
    assert (tmp_path / "encoder.onnx.data").samefile(bundle.path / "encoder.onnx.data")


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_was_killed_is_one_sentence(bundle, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder_module, "_climb", killed)
    with pytest.raises(
        BackendError, match=r"measuring the graph 'encoder' was killed.*memory.*--precision fp32"
    ):
        choose(bundle, "encoder", Ladder(recordings, AUTO), tmp_path)


# ---- with a real builder ----


@pytest.fixture
def rtx():
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed: it builds on the GPU it builds for")
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU"
    )


def test_every_rung_builds_and_is_accepted(rtx, bundle_copy, recordings, capfd):
    """And prints its engine's size and seconds."""
    bundle, facts = Bundle.open(bundle_copy), find_builder(86).facts
    made = {}
    for precision in ("int8", "fp16"):
        graphs = [name for name, rungs in RUNGS.items() if precision in rungs]
        asked = {
            "compute_capability": 86,
            "graphs": graphs,
            "ladder": Ladder(recordings, precision),
        }
        made[precision] = build_engines(bundle, **asked)
        for name in graphs:
            assert (
                check_engine(bundle, name, facts).stat().st_size == made[precision][name]["bytes"]
            )
    assert (
        made["int8"]["encoder"]["precision"] == "int8"
        and made["fp16"]["llm"]["precision"] == "int4/fp16"
    )
    assert (
        len({entry["built_sha256"] for entry in (made["int8"]["encoder"], made["fp16"]["encoder"])})
        == 2
    )
    with capfd.disabled():
        for name, entry in itertools.chain(made["int8"].items(), made["fp16"].items()):
            print(
                f"\n{name} {entry['precision']}: {entry['bytes'] / 1e6:.1f} MB in {entry['seconds']:.1f} s",
                end="",
            )


FAKE = """
import json, pathlib, sys
job = json.load(sys.stdin)
pathlib.Path(job["engine"]).write_bytes(pathlib.Path(job["graph"]).read_bytes())
print(json.dumps({"seconds": 0.0, "peak_memory_bytes": 1}))
"""


@pytest.fixture
def fake_build(monkeypatch):
    """A "builder" whose engines are the graphs it was given, and a ladder that climbs in this process and counts."""
    import sys

    from tiny_align.engines import process

    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", FAKE))
    climbed = []

    def chosen(bundle, name, ladder, folder):
        own = bundle.manifest.graphs[name].precision
        if not ladder.rungs(name, own):
            return choose(bundle, name, ladder, folder)
        climbed.append(name)
        (folder / f"{name}.rung.onnx").write_bytes(b"rung")
        return Choice(
            folder / f"{name}.rung.onnx", "fp16", {"fp16": {"cosine": 0.9999, "bound": 0.999}}
        )

    monkeypatch.setattr("tiny_align.engines.build.choose", chosen)
    return climbed


def test_the_choice_is_stored_and_not_made_twice(fake_build, bundle_copy, recordings):
    bundle = Bundle.open(bundle_copy)
    first = build_engines(bundle, ladder=Ladder(recordings, AUTO))
    folder = next((bundle_copy / "engines").iterdir())
    stored = json.loads((folder / "engine.json").read_text())["graphs"]["encoder"]
    assert stored == first["encoder"] and stored["accuracy"] == {
        "fp16": {"cosine": 0.9999, "bound": 0.999}
    }
    assert stored["built_sha256"] == sha256(folder / "encoder.engine") != stored["graph_sha256"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "encoder.engine",
        "engine.json",
        "llm.engine",
        "projector.engine",
    ]
    assert fake_build == ["encoder", "llm"]
    assert build_engines(bundle, ladder=Ladder(recordings, AUTO)) == build_engines(bundle) == first
    assert fake_build == ["encoder", "llm"], (
        "the same question and none at all leave the engines as they are"
    )
    build_engines(bundle, ladder=Ladder(recordings[:4], AUTO))
    assert fake_build == ["encoder", "llm"] * 2, "other recordings are another question"
    assert build_engines(bundle, ladder=Ladder())["encoder"]["precision"] == "fp32"
    assert fake_build == ["encoder", "llm"] * 2


def test_a_killed_build_goes_on_with_its_choices(fake_build, bundle_copy, recordings, monkeypatch):
    from tiny_align.engines import build

    bundle, real = Bundle.open(bundle_copy), build.run_build

    def dies_at_the_llm(name, job, tell):
        if name == "llm":
            raise KeyboardInterrupt
        return real(name, job, tell)

    monkeypatch.setattr(build, "run_build", dies_at_the_llm)
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
    shutil.move(bundle_copy / "engines", engines := bundle_copy.parent / "engines")
    write_manifest(bundle_copy, Bundle.open(bundle_copy, verify=False).manifest)
    shutil.move(engines, bundle_copy / "engines")
    with pytest.raises(BackendError, match=r"from another encoder\.onnx\.data"):
        check_engine(Bundle.open(bundle_copy), "encoder", facts)
