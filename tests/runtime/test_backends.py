"""The contract of a backend, on a toy one (tests/support/toy_backend.py), and what the registry
makes of it.
"""

import dataclasses

import numpy as np
import pytest

from tests.support import toy_backend
from tiny_align.runtime import Assistant
from tiny_align.runtime.backends import budget, onnxruntime, registry
from tiny_align.runtime.backends.registry import find_backend, graph_specs, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import MANIFEST
from tiny_align.runtime.errors import BackendError, BundleError


@pytest.fixture
def toy(monkeypatch):
    """The toy backend, registered by one line as every other is."""
    monkeypatch.setitem(registry.MODULES, "toy", "tests.support.toy_backend")
    return toy_backend.BACKEND


@pytest.fixture
def bundle(bundle_path):
    return Bundle.open(bundle_path, verify=False)


def test_a_new_backend_answers_like_onnx_runtime(toy, bundle_path, voice_path, run_cli):
    recording = voice_path / "test-100.flac"
    documents = {}
    for backend in ("onnxruntime", "toy"):
        arguments = ("--bundle", bundle_path, "--backend", backend, "--threads", 1, "--json")
        done = run_cli("run", recording, *arguments)
        assert done.status == 0, done.stderr
        documents[backend] = done.document
    assert documents["toy"]["backend"] == "toy"
    assert documents["toy"]["text"] == documents["onnxruntime"]["text"] != ""


def test_the_doctor_lists_a_new_backend(toy, run_cli):
    findings = {f["what"]: f for f in run_cli("doctor", "--json").document["findings"]}
    assert findings["toy"]["value"] == "built in" and findings["toy"]["ok"]
    assert "ONNX Runtime" in findings


def test_the_budget_counts_a_new_backends_cache_sets(toy, bundle):
    one_set = budget.cache_bytes(bundle, "onnxruntime", 100)
    assert budget.cache_bytes(bundle, "toy", 100) == toy.cache_sets * one_set
    assert budget.budget(bundle, "toy", 100).cache == toy.cache_sets * one_set


def test_an_unknown_backend_is_refused_with_the_names_there_are(toy, bundle):
    with pytest.raises(
        BackendError, match=r"no backend 'abacus': choose one of onnxruntime, tensorrt, toy$"
    ):
        Assistant.load(bundle, backend="abacus")
    with pytest.raises(BackendError, match="no backend 'abacus'"):
        load_runner(bundle.graph("encoder"), bundle.manifest.graphs["encoder"], "abacus")


def test_a_backend_for_the_llm_only_takes_the_graphs_of_another(bundle, monkeypatch, speech):
    """As llama.cpp will: a decoder of its own, encoder and projector by ONNX Runtime."""
    backend = dataclasses.replace(
        toy_backend.BACKEND,
        load_runner=onnxruntime.load_runner,
        runner_graphs="onnxruntime",
    )
    monkeypatch.setattr(toy_backend, "BACKEND", backend)
    monkeypatch.setitem(registry.MODULES, "toy", "tests.support.toy_backend")
    plain = bundle.manifest.graphs
    own = dataclasses.replace(plain["encoder"], file="encoder.ort.onnx")
    graphs = {
        **plain,
        "encoder": dataclasses.replace(plain["encoder"], backends={"onnxruntime": own}),
    }
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs)
    specs = graph_specs(dataclasses.replace(bundle, manifest=manifest), "toy")
    assert (specs["encoder"], specs["llm"]) == (own, plain["llm"])
    with Assistant.load(bundle, backend="toy", threads=1) as assistant:
        got = assistant.answer(speech)
    with Assistant.load(bundle, threads=1) as assistant:
        assert got.tokens == assistant.answer(speech).tokens


def test_names_are_importable_without_numpy(run_python):
    done = run_python(
        "import sys\n"
        "from tiny_align.runtime.backends import registry\n"
        "print(registry.names(), 'numpy' in sys.modules)"
    )
    assert done.stdout.strip() == "('onnxruntime', 'tensorrt') False", done.stderr


@pytest.mark.parametrize("name", registry.names())
def test_a_backend_has_the_name_it_is_registered_by(name):
    assert find_backend(name).name == name


# --- what a runner checks for every backend ---


@pytest.fixture
def encoder(bundle, toy):
    spec = bundle.manifest.graphs["encoder"]
    with load_runner(bundle.graph("encoder"), spec, "toy", 1) as runner:
        yield runner


def test_a_missing_input_is_refused(encoder):
    with pytest.raises(BackendError, match=r"expected the inputs \['input_features'\], got \[\]"):
        encoder({})


@pytest.mark.parametrize(
    "value",
    [np.zeros((1, 217, 80)), np.zeros((1, 217, 81), "float32"), np.zeros((217, 80), "float32")],
    ids=["dtype", "size", "dimensions"],
)
def test_a_wrong_dtype_or_shape_is_refused(encoder, value):
    with pytest.raises(
        BackendError,
        match=r"expected input input_features as float32 \[1, 'frames', 80\], got float",
    ):
        encoder({"input_features": value})


# --- which activations a graph quantises ---


@pytest.fixture
def options(monkeypatch):
    """What ONNX Runtime is asked for: session option -> value."""
    import onnxruntime as ort

    asked = {}

    class SessionOptions(ort.SessionOptions):
        def add_session_config_entry(self, name, value):
            asked[name] = value
            super().add_session_config_entry(name, value)

    monkeypatch.setattr(ort, "SessionOptions", SessionOptions)
    return asked


@pytest.mark.parametrize(
    ("operators", "exact"),
    [
        ("QuantizeLinear DequantizeLinear", True),
        ("DynamicQuantizeLinear", False),
        ("DequantizeLinear", False),
        ("DynamicQuantizeLinear QuantizeLinear", True),
    ],
)
def test_a_graph_without_the_field_is_examined(options, tmp_path, operators, exact):
    path = tmp_path / "graph.onnx"
    path.write_text(operators)
    with pytest.raises(BackendError, match="cannot load"):  # it is no graph
        onnxruntime.open_session(path, 1, spinning=False)
    assert ("session.x64quantprecision" in options) is exact


@pytest.mark.parametrize(("activations", "exact"), [("static", True), ("none", False)])
def test_the_field_decides_without_a_look_at_the_graph(options, tmp_path, activations, exact):
    path = tmp_path / "not-there.onnx"
    with pytest.raises(BackendError, match="cannot load"):
        onnxruntime.open_session(path, 1, spinning=False, activations=activations)
    assert ("session.x64quantprecision" in options) is exact


def test_a_rungs_graph_is_examined_whatever_the_bundles_own_is(bundle, tmp_path):
    """A rung of an engine's precisions may quantise what the bundle's graph does not."""
    pytest.importorskip("onnx")
    from tiny_align.engines.measure import SourceGraph

    encoder = dataclasses.replace(bundle.manifest.graphs["encoder"], quantised_activations="none")
    graphs = {**bundle.manifest.graphs, "encoder": encoder}
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs)
    exported = dataclasses.replace(bundle, manifest=manifest)
    assert SourceGraph(exported, "encoder", tmp_path).spec.quantised_activations is None


def test_an_unknown_value_of_the_field_is_refused(bundle_copy, edit_json):
    edit_json(
        bundle_copy / MANIFEST,
        lambda m: m["graphs"]["encoder"].update(quantised_activations="some"),
    )
    with pytest.raises(
        BundleError, match=r"quantised_activations is 'some': expected none, dynamic, static"
    ):
        Bundle.open(bundle_copy)
