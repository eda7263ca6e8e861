"""`tiny-align build-engines` for the shipped bundle: a real NVIDIA builder, without a GPU."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tiny_align.engines.builder import find_builder
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import check_engine
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import gpu_compute_capability

GRAPHS = ("encoder", "projector", "llm")


@pytest.fixture
def rtx():
    """TensorRT-RTX and no TensorRT, which would be preferred and needs a GPU."""
    pytest.importorskip("polygraphy")
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed: it builds on the GPU it builds for")
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU"
    )


def test_every_graph_of_the_reference_bundle_builds(rtx, run_cli, bundle_copy):
    done = run_cli("build-engines", "--bundle", bundle_copy, "--compute-capability", 86, "--json")
    assert done.status == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    manifest = Bundle.open(bundle_copy).manifest  # the bundle is unchanged
    engines = done.document["engines"]
    assert set(engines) == set(GRAPHS)
    folder = bundle_copy / "engines" / done.document["key"]
    assert done.document["key"].endswith("-sm86") and str(folder) == done.document["path"]
    for name, engine in engines.items():
        assert engine["precision"] == manifest.graphs[name].precision
        assert engine["bytes"] == (folder / f"{name}.engine").stat().st_size > 10_000
        assert engine["seconds"] > 0
        assert ("REFIT" in engine["flags"]) == (
            name == "projector" and gpu_compute_capability() is not None
        )
    assert json.loads((folder / "engine.json").read_text())["graphs"] == engines


def test_engine_of_a_user_is_refused_for_another_user(rtx, run_cli, bundle_copy, make_user):
    bundle = Bundle.open(bundle_copy)
    ana = make_user(bundle, bundle_copy / "users" / "ana", 0.3)
    ben = make_user(bundle, bundle_copy / "users" / "ben", 0.1)
    done = run_cli("build-engines", "--bundle", bundle_copy, "--user", "ana", "--json")
    assert done.status == 0, done.stderr
    facts = find_builder().facts
    engine = check_engine(bundle.for_user(ana), "projector", facts)
    assert engine.parent == Path(done.document["path"])
    shutil.copytree(ana / "engines", ben / "engines")
    with pytest.raises(
        BackendError, match=r"from another projector\.onnx\.data.*--bundle \S+ --user ben`"
    ):
        check_engine(bundle.for_user(ben), "projector", facts)
