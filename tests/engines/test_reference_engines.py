"""The shipped bundle through `tiny-align build-engines`: a real NVIDIA builder takes every graph, without a GPU."""

import importlib.util
import json

import pytest

from tiny_align.engines.build import build_engines
from tiny_align.runtime.bundle import Bundle

GRAPHS = ("encoder", "projector", "llm")


@pytest.fixture
def rtx():
    """TensorRT-RTX and no TensorRT, which would be preferred and needs a GPU."""
    pytest.importorskip("polygraphy")
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed: it builds on the GPU it builds for")
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU")


def test_every_graph_of_the_reference_bundle_builds(rtx, run_cli, bundle_copy):
    done = run_cli("build-engines", "--bundle", bundle_copy, "--compute-capability", 86, "--json")
    assert done.status == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    manifest, engines = Bundle.open(bundle_copy).manifest, done.document["engines"]  # the bundle is still whole
    assert set(engines) == set(GRAPHS)
    folder = bundle_copy / "engines" / done.document["key"]
    assert done.document["key"].endswith("-sm86") and str(folder) == done.document["path"]
    for name, engine in engines.items():
        assert engine["precision"] == manifest.graphs[name].precision
        assert engine["bytes"] == (folder / f"{name}.engine").stat().st_size > 10_000
        assert engine["seconds"] > 0
    assert json.loads((folder / "engine.json").read_text())["graphs"] == engines


def test_a_persons_projector_becomes_an_engine_of_their_own(rtx, bundle_path, make_user, tmp_path):
    """What TensorRT-RTX loads for a person: without a GPU it builds no engine that takes other weights (REFIT)."""
    person = Bundle.open(bundle_path).person(make_user(Bundle.open(bundle_path), tmp_path / "ana"))
    built = build_engines(person, compute_capability=86, graphs=["projector"])
    (engine,) = (tmp_path / "ana/engines").glob("*-sm86/projector.engine")
    assert engine.stat().st_size == built["projector"]["bytes"] and built["projector"]["seconds"] < 60
