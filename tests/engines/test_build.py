"""Profiles, choice of builder, and builds, real ones with TensorRT-RTX (no GPU is needed)."""

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from tiny_align.engines import build as build_module
from tiny_align.engines import build_one, command, engine_folder, preflight
from tiny_align.engines import builder as builder_module
from tiny_align.engines import process as process_module
from tiny_align.engines.build import build_engines, graph_files, graph_source, make_job
from tiny_align.engines.builder import find_builder
from tiny_align.engines.progress import Phases, make_monitor
from tiny_align.engines.select_precision import Selection
from tiny_align.runtime import machine
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import check_engine
from tiny_align.runtime.bundle.manifest import (
    EncoderSpec,
    GraphSpec,
    LlmSpec,
    Manifest,
    PromptSpec,
    TensorSpec,
    write_manifest,
)
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.errors import BackendError, BundleError
from tiny_align.runtime.files import sha256
from tiny_align.runtime.front_ends.nemo import NemoMel
from tiny_align.runtime.readout import Readout

onnx = pytest.importorskip("onnx", reason="the graphs to build are made with onnx")

DIMS = {"past": (0, 16, 64), "new": (1, 4, 32)}
SIZE = 64  # of every feature axis; a multiple of BLOCK
BLOCK = 32  # weights per INT4 scale


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU"
    )


def spec(file, precision, inputs, outputs) -> GraphSpec:
    input_specs = tuple(TensorSpec(name, "float32", shape) for name, shape in inputs.items())
    output_specs = tuple(TensorSpec(name, "float32", shape) for name, shape in outputs.items())
    return GraphSpec(file, precision, input_specs, output_specs)


CACHED = spec(
    "cached.onnx",
    "fp32",
    {"cache": (1, "past", SIZE), "x": (1, "new", SIZE)},
    {"y": (1, "past + new", SIZE)},
)
INT4 = spec("int4.onnx", "int4", {"x": (1, "new", SIZE)}, {"y": (1, "new", SIZE)})
UNSUPPORTED = spec("unsupported.onnx", "fp32", {"x": (SIZE,)}, {"y": ("found",), "z": (SIZE,)})


def float_info(tensor: TensorSpec):
    return onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, tensor.shape)


def save(folder: Path, graph: GraphSpec, nodes, weights, **options) -> None:
    infos = []
    for side in (graph.inputs, graph.outputs):
        infos.append(list(map(float_info, side)))
    onnx_graph = onnx.helper.make_graph(nodes, "graph", *infos, weights)
    model = onnx.helper.make_model(
        onnx_graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, folder / graph.file, **options)


def save_cached(folder: Path) -> None:
    """Concatenation with a cache that may be empty, then a matrix in external data."""
    weight = onnx.numpy_helper.from_array(np.eye(SIZE, dtype=np.float32), "w")
    nodes = [
        onnx.helper.make_node("Concat", ["cache", "x"], ["all"], axis=1),
        onnx.helper.make_node("MatMul", ["all", "w"], ["y"]),
    ]
    external = {"save_as_external_data": True, "location": "cached.onnx.data", "size_threshold": 0}
    save(folder, CACHED, nodes, [weight], **external)


def save_int4(folder: Path, scale: float = 0.01) -> None:
    """Weights dequantised block by block along the input axis, as opset 21 has it."""
    quantised = np.random.default_rng(0).integers(-8, 8, SIZE * SIZE)
    weights = [
        onnx.helper.make_tensor("w", onnx.TensorProto.INT4, (SIZE, SIZE), quantised),
        onnx.numpy_helper.from_array(np.full((SIZE // BLOCK, SIZE), scale, np.float32), "scale"),
    ]
    nodes = [
        onnx.helper.make_node(
            "DequantizeLinear", ["w", "scale"], ["dequantised"], axis=0, block_size=BLOCK
        ),
        onnx.helper.make_node("MatMul", ["x", "dequantised"], ["y"]),
    ]
    save(folder, INT4, nodes, weights)


def save_unsupported(folder: Path) -> None:
    nodes = [
        onnx.helper.make_node("Unique", ["x"], ["y"], name="first"),
        onnx.helper.make_node("Gelu2", ["x"], ["z"]),
    ]
    save(folder, UNSUPPORTED, nodes, [])


SAVERS = {"cached": save_cached, "int4": save_int4, "unsupported": save_unsupported}
SPECS = {"cached": CACHED, "int4": INT4, "unsupported": UNSUPPORTED}


def make_bundle(path: Path, *names: str) -> Bundle:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        SAVERS[name](path)
    manifest = Manifest(
        name="test",
        front_end=NemoMel(),
        encoder=EncoderSpec(SIZE, 0.04),
        llm=LlmSpec(100, SIZE, 1, 1, SIZE, (0,), 64),
        prompt=PromptSpec("", "", "", "", ""),
        projector={},
        projector_weights=(),
        graphs={name: SPECS[name] for name in names},
        dims=DIMS,
        embeddings_sha256="",
        readout=Readout("pooled"),
        files={},
    )
    write_manifest(path, manifest)
    return Bundle.open(path)


def read_record(bundle: Bundle, key: str) -> dict:
    return json.loads((bundle.path / "engines" / key / "engine.json").read_text())


# ---- profile ----


def test_profile_takes_static_and_dynamic_dimensions():
    shapes = graph_profile(CACHED, DIMS)
    assert shapes == {
        "cache": ((1, 0, SIZE), (1, 16, SIZE), (1, 64, SIZE)),
        "x": ((1, 1, SIZE), (1, 4, SIZE), (1, 32, SIZE)),
    }


def test_profile_names_a_dimension_without_values():
    with pytest.raises(
        BundleError, match=r"lack 'past', a dimension of input 'cache' of cached\.onnx"
    ):
        graph_profile(CACHED, {"new": (1, 4, 32)})


@pytest.mark.parametrize("values", [(5, 4, 32), (1, 40, 32), (-1, 4, 32)])
def test_profile_refuses_values_out_of_order(values):
    with pytest.raises(BundleError, match="min <= opt <= max"):
        graph_profile(CACHED, {**DIMS, "new": values})


# ---- choice of builder ----


def pretend(monkeypatch, gpu: int | None, **packages) -> None:
    """A machine with this GPU and these packages, None for one that is not installed."""
    monkeypatch.setattr(builder_module, "gpu_compute_capability", lambda: gpu)
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)


def fake(version: str, *capabilities: str) -> types.SimpleNamespace:
    members = types.SimpleNamespace(__members__=dict.fromkeys(["NONE", "CURRENT", *capabilities]))
    return types.SimpleNamespace(__version__=version, Builder=object, ComputeCapability=members)


def test_error_without_a_builder_tells_how_to_install_one(monkeypatch):
    pretend(monkeypatch, None, tensorrt=None, tensorrt_rtx=None)
    with pytest.raises(
        BackendError,
        match=r"(?s)JetPack.*--system-site-packages.*pip install tiny-align\[trt\] tensor",
    ):
        find_builder()


def test_a_folder_named_like_the_package_is_not_a_builder(monkeypatch):
    pretend(monkeypatch, None, tensorrt=types.ModuleType("tensorrt"), tensorrt_rtx=None)
    with pytest.raises(BackendError, match="neither TensorRT nor TensorRT-RTX"):
        find_builder()


def test_tensorrt_is_preferred_and_builds_for_this_gpu(monkeypatch):
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"), tensorrt_rtx=fake("1.7.1", "SM86"))
    assert find_builder().key == find_builder(87).key == "tensorrt-10.3.0-sm87"


def test_tensorrt_refuses_another_gpu(monkeypatch):
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"))
    with pytest.raises(BackendError, match="expected compute capability 87, got 86"):
        find_builder(86)


def test_tensorrt_without_a_gpu_is_refused(monkeypatch):
    pretend(monkeypatch, None, tensorrt=fake("10.3.0"))
    with pytest.raises(BackendError, match="build on the device"):
        find_builder(87)


@pytest.mark.parametrize(
    ("gpu", "wanted", "target"), [(None, None, 86), (89, None, 89), (89, 86, 86)]
)
def test_rtx_target(monkeypatch, gpu, wanted, target):
    pretend(monkeypatch, gpu, tensorrt=None, tensorrt_rtx=fake("1.7.1", "SM86", "SM89"))
    assert find_builder(wanted).key == f"tensorrt_rtx-1.7.1-sm{target}"


@pytest.mark.parametrize(("gpu", "wanted"), [(90, None), (None, 87)])
def test_rtx_error_lists_its_targets(monkeypatch, gpu, wanted):
    pretend(monkeypatch, gpu, tensorrt=None, tensorrt_rtx=fake("1.7.1", "SM86", "SM120"))
    with pytest.raises(
        BackendError, match=f"{gpu or wanted}: give --compute-capability with one of 86, 120"
    ):
        find_builder(wanted)


def test_missing_tools_are_listed(monkeypatch):
    pretend(monkeypatch, None, tensorrt=None, tensorrt_rtx=fake("1.7.1", "SM86"))
    monkeypatch.setattr(builder_module, "TOOLS", ("onnx", "no_such_tool"))
    with pytest.raises(BackendError, match=r"needs no_such_tool: `pip install tiny-align\[trt\]`"):
        find_builder()


class FakeCuda:
    """The driver calls, for a GPU of compute capability 8.7 or none."""

    def __init__(self, gpu: bool):
        self.gpu = gpu

    def cuInit(self, _flags):
        return 0 if self.gpu else 100

    def cuDeviceGet(self, device, _ordinal):
        device._obj.value = 0
        return 0

    def cuDeviceGetAttribute(self, value, attribute, _device):
        value._obj.value = {
            machine.COMPUTE_CAPABILITY_MAJOR: 8,
            machine.COMPUTE_CAPABILITY_MINOR: 7,
        }[attribute]
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12060
        return 0

    def cuDeviceGetName(self, name, size, _device):
        name.value = b"Orin"[:size]
        return 0


@pytest.mark.parametrize(
    ("there", "expected"), [(True, {"gpu": "Orin", "cuda": "12.6"}), (False, {})]
)
def test_gpu_and_its_cuda(monkeypatch, there, expected):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _name: FakeCuda(there))
    assert machine.gpu() == expected


def test_l4t_release(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "L4T_RELEASE", tmp_path / "release")
    assert machine.l4t_release() is None
    (tmp_path / "release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    assert machine.l4t_release() == "36.4.3"


@pytest.mark.parametrize(("gpu", "expected"), [(True, 87), (False, None)])
def test_gpu_compute_capability(monkeypatch, gpu, expected):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _name: FakeCuda(gpu))
    assert machine.gpu_compute_capability() == expected


def test_free_memory(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4 kB\nMemAvailable: 2048 kB\nCmaFree: 1024 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    assert machine.free_memory_line() == "MemAvailable 2 MiB, CmaFree 1 MiB"


# ---- builds ----


@pytest.fixture(scope="module")
def built(rtx, tmp_path_factory):
    """A bundle whose engines were built by the command; read only."""
    path = tmp_path_factory.mktemp("bundle")
    make_bundle(path, "int4", "cached")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--bundle", str(path), "--compute-capability", "86"])
    args.json = True
    return Bundle.open(path), command.run(args)


def test_build_reports_and_records_every_engine(rtx, built):
    bundle, result = built
    key = f"tensorrt_rtx-{rtx.__version__}-sm86"
    assert result["key"] == key and result["path"] == str(bundle.path / "engines" / key)
    record = read_record(bundle, key)
    assert (record["package"], record["version"]) == ("tensorrt_rtx", rtx.__version__)
    assert record["compute_capability"] == 86 and record["jetpack"] == machine.l4t_release()
    assert record["machine"]["system"]
    assert record["graphs"] == result["engines"]
    assert [e["precision"] for e in result["engines"].values()] == ["fp32", "int4"]


@pytest.mark.parametrize("name", ["cached", "int4"])
def test_entry_describes_graph_and_engine(built, name):
    bundle, result = built
    entry = result["engines"][name]
    engine = Path(result["path"]) / f"{name}.engine"
    assert entry["bytes"] == engine.stat().st_size > SIZE * SIZE // 2
    assert entry["engine_sha256"] == sha256(engine)
    assert entry["graph_sha256"] == bundle.manifest.files[f"{name}.onnx"]
    assert entry["files"].items() <= bundle.manifest.files.items()
    assert entry["seconds"] > 0 and 50e6 < entry["peak_memory_bytes"] < 4e9
    assert entry["flags"] == [] and entry["optimization_level"] == 3  # TF32 is off
    need = preflight.build_need_bytes(sum((bundle.path / f).stat().st_size for f in entry["files"]))
    assert entry["peak_memory_bytes"] < need < 4e9


def test_entry_has_external_data_and_profile(built):
    entry = built[1]["engines"]["cached"]
    assert set(entry["files"]) == {"cached.onnx", "cached.onnx.data"}
    assert entry["profile"]["cache"] == {
        "min": [1, 0, SIZE],
        "opt": [1, 16, SIZE],
        "max": [1, 64, SIZE],
    }


def test_largest_graph_comes_first(built):
    bundle, result = built
    sizes = []
    for entry in result["engines"].values():
        sizes.append(sum((bundle.path / file).stat().st_size for file in entry["files"]))
    assert sizes == sorted(sizes, reverse=True)
    assert list(bundle.manifest.graphs) == ["int4", "cached"]


def test_bundle_with_engines_is_unchanged(built):
    Bundle.open(built[0].path)
    assert not list(built[0].path.glob("engines/.*"))


def test_unsupported_operators_are_all_named_and_nothing_is_left(rtx, tmp_path):
    bundle = make_bundle(tmp_path, "unsupported")
    with pytest.raises(BackendError, match=r"(?s)does not build.*unsupported\.onnx.*Unique.*Gelu2"):
        build_engines(bundle, compute_capability=86)
    assert not (tmp_path / "engines").exists()


def test_errors_of_the_builder_are_passed_on(rtx, tmp_path):
    """The manifest disagrees with the graph: no parser error, the builder's own."""
    bundle = make_bundle(tmp_path, "int4")
    wrong = dataclasses.replace(INT4, inputs=(TensorSpec("x", "float32", (1, "new", SIZE + 1)),))
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, graphs={"int4": wrong}))
    with pytest.raises(
        BackendError,
        match=rf"Dimension mismatch for tensor x.*max={SIZE + 1} but tensor has {SIZE}",
    ):
        build_engines(bundle, compute_capability=86)


# ---- without a builder: what happens around the build process ----

FAKE_BUILD = """
import json, pathlib, sys
job = json.load(sys.stdin)
graph = pathlib.Path(job["graph"])
with open(graph.with_name("built"), "a") as log:
    print(graph.stem, file=log)
pathlib.Path(job["engine"]).write_text(job["graph"])
print("chatter")
print(json.dumps({"progress": 0.5, "phase": "Halfway"}))
print(json.dumps({"seconds": 1.0, "peak_memory_bytes": 1}))
"""


@pytest.fixture
def child(monkeypatch):
    """Replace the build process by a script."""
    pretend(monkeypatch, None, tensorrt=None, tensorrt_rtx=fake("1.7.1", "SM86", "SM89"))
    return lambda script: monkeypatch.setattr(
        process_module, "COMMAND", (sys.executable, "-c", script)
    )


def test_killed_build_is_reported_and_leaves_nothing(child, tmp_path):
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(BackendError, match=r"'int4'.*was killed.*memory ran out.*MemAvailable"):
        build_engines(make_bundle(tmp_path, "int4"), compute_capability=None)
    assert not (tmp_path / "engines").exists()


def test_crashed_build_passes_on_its_stderr(child, tmp_path):
    child("raise SystemExit('last words')")
    with pytest.raises(
        BackendError, match=r"(?s)crashed on the graph 'int4'.*exit status 1.*last words"
    ):
        build_engines(make_bundle(tmp_path, "int4"))


def test_failed_build_leaves_the_old_engines(child, tmp_path):
    bundle = make_bundle(tmp_path, "int4", "cached")
    child(FAKE_BUILD)
    build_engines(bundle)
    before = read_record(bundle, "tensorrt_rtx-1.7.1-sm86")
    child("raise SystemExit(4)")
    with pytest.raises(BackendError, match="exit status 4"):
        build_engines(bundle, graphs=["int4"])
    assert read_record(bundle, "tensorrt_rtx-1.7.1-sm86") == before


def test_one_graph_rebuilt_keeps_the_others(child, tmp_path):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4", "cached")
    first = build_engines(bundle)
    assert list(build_engines(bundle, graphs=["int4"])) == ["int4"]
    assert read_record(bundle, "tensorrt_rtx-1.7.1-sm86")["graphs"] == first
    assert (tmp_path / "engines/tensorrt_rtx-1.7.1-sm86/cached.engine").is_file()


def test_engine_of_changed_weights_is_not_taken_over(child, tmp_path):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4", "cached")
    build_engines(bundle)
    with open(tmp_path / "cached.onnx.data", "r+b") as data:
        data.write(b"\1")
    build_engines(bundle, graphs=["int4"])
    assert list(read_record(bundle, "tensorrt_rtx-1.7.1-sm86")["graphs"]) == ["int4"]
    assert not (tmp_path / "engines/tensorrt_rtx-1.7.1-sm86/cached.engine").exists()


def test_damaged_engine_is_not_taken_over(child, tmp_path):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4", "cached")
    build_engines(bundle)
    folder = tmp_path / "engines/tensorrt_rtx-1.7.1-sm86"
    (folder / "cached.engine").unlink()
    (folder / "cached.engine").write_text("cut off")
    build_engines(bundle, graphs=["int4"])
    assert list(read_record(bundle, folder.name)["graphs"]) == ["int4"]
    assert not (folder / "cached.engine").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"package": "tensorrt_rtx"}', None])
def test_engines_without_a_valid_record_are_built_again(child, tmp_path, text):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4", "cached")
    entries = build_engines(bundle)
    record = tmp_path / "engines/tensorrt_rtx-1.7.1-sm86/engine.json"
    record.unlink()
    if text is not None:
        record.write_text(text)
    assert build_engines(bundle) == read_record(bundle, record.parent.name)["graphs"] == entries
    assert len((tmp_path / "built").read_text().split()) == 4


def test_another_jetpack_builds_everything_again(child, monkeypatch, tmp_path):
    """The folder has the same name: the key is of TensorRT and the GPU."""
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4")
    build_engines(bundle)
    monkeypatch.setattr(builder_module, "l4t_release", lambda: "36.4.3")
    with pytest.raises(BackendError, match="JetPack"):
        check_engine(bundle, "int4", find_builder().facts)
    build_engines(bundle)
    assert check_engine(bundle, "int4", find_builder().facts).is_file()
    assert (tmp_path / "built").read_text().split() == ["int4", "int4"]


def test_targets_have_folders_of_their_own(child, tmp_path):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4")
    for target in (86, 89):
        build_engines(bundle, compute_capability=target)
    assert sorted(p.name for p in (tmp_path / "engines").iterdir()) == [
        f"tensorrt_rtx-1.7.1-sm{t}" for t in (86, 89)
    ]


@pytest.mark.parametrize("graphs", [["int4", "decoder"], []])
def test_unknown_graph_is_refused(tmp_path, graphs):
    with pytest.raises(BundleError, match=r"has no graph .*: it has int4"):
        build_engines(make_bundle(tmp_path, "int4"), graphs=graphs)


def test_missing_external_data_is_named(tmp_path):
    save_cached(tmp_path)
    (tmp_path / "cached.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"cached\.onnx\.data.*is missing"):
        graph_files(tmp_path / "cached.onnx")


def test_file_that_is_no_graph_is_named(tmp_path):
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(BundleError, match=r"text\.onnx is not an ONNX graph"):
        graph_files(tmp_path / "text.onnx")


def test_unwritable_bundle_is_an_error(child, tmp_path):
    bundle = make_bundle(tmp_path, "int4")
    (tmp_path / "engines").write_text("a file in the way")
    with pytest.raises(BackendError, match="cannot write engines to"):
        build_engines(bundle)


def test_command_prints_engines_and_progress(child, tmp_path, capsys):
    child(FAKE_BUILD)
    make_bundle(tmp_path, "int4")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(["--bundle", str(tmp_path)], argparse.Namespace(json=False)))
    printed, shown = capsys.readouterr()
    assert (
        "tensorrt_rtx 1.7.1 for compute capability 86" in printed
        and "int4: int4, 0.0 MB" in printed
    )
    assert "100%" in shown and "int4: Halfway" in shown


# ---- memory, and a killed build ----


def pretend_memory(monkeypatch, tmp_path, **megabytes: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("".join(f"{name}: {size * 1000} kB\n" for name, size in megabytes.items()))
    monkeypatch.setattr(machine, "MEMINFO", meminfo)


def test_too_little_memory_is_refused_with_remedies(child, monkeypatch, tmp_path):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4")
    pretend_memory(monkeypatch, tmp_path, MemAvailable=300, SwapFree=10, CmaFree=20)
    memory = r"'int4' takes about 476 MiB.*MemAvailable 292 MiB.*CmaFree 19 MiB"
    with pytest.raises(BackendError, match=rf"(?s){memory}.*add swap.*cma=950M.*--force"):
        build_engines(bundle)
    assert not (tmp_path / "engines").exists() and not (tmp_path / "built").exists()
    assert list(build_engines(bundle, force=True)) == ["int4"]


def test_swap_counts_for_tensorrt_rtx_only(child, monkeypatch, tmp_path):
    """TensorRT builds in the GPU's memory, which cannot be swapped; TensorRT-RTX needs no GPU."""
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4")
    pretend_memory(monkeypatch, tmp_path, MemAvailable=300, SwapFree=300)
    assert build_engines(bundle)
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"))
    with pytest.raises(BackendError, match="MemAvailable 292 MiB") as refused:
        build_engines(bundle)
    assert "add swap" not in str(refused.value)


def test_only_tensorrt_has_a_timing_cache_and_it_is_used_again(child, monkeypatch, tmp_path):
    child(
        FAKE_BUILD
        + "cache = job['timing_cache']\nif cache: open(cache, 'a').write(graph.stem + ' ')"
    )
    bundle = make_bundle(tmp_path, "int4", "cached")
    build_engines(bundle)
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"))
    for _ in range(2):
        build_engines(bundle, graphs=["int4", "cached"])
    assert [p.parent.name for p in tmp_path.rglob("timing.cache")] == ["tensorrt-10.3.0-sm87"]
    assert next(tmp_path.rglob("timing.cache")).read_text() == "cached int4 " * 2


BUILD_TWICE = """
import json, sys
from tiny_align.engines.build_one import build
job = json.loads(sys.argv[1])
build(job)
first = open(job["timing_cache"], "rb").read()
build(job)
assert first
"""


def test_the_builder_reads_and_writes_its_timing_cache(rtx, tmp_path):
    """TensorRT-RTX accepts the calls but times nothing while it builds: only a test of the path."""
    save_int4(tmp_path)
    shapes = [(1, n, SIZE) for n in (1, 4, 32)]
    job = {
        "graph": str(tmp_path / "int4.onnx"),
        "engine": str(tmp_path / "e"),
        "package": "tensorrt_rtx",
        "compute_capability": 86,
        "profile": {"x": shapes},
        "refittable": False,
        "timing_cache": str(tmp_path / "cache"),
    }
    line = [sys.executable, "-c", BUILD_TWICE, json.dumps(job)]
    subprocess.run(line, check=True, capture_output=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "e", "int4.onnx"]


@pytest.mark.parametrize(("gpu", "refittable"), [(87, [False, True]), (None, [False, False])])
def test_projector_is_refittable_if_there_is_a_gpu(monkeypatch, tmp_path, gpu, refittable):
    monkeypatch.setattr(build_module, "gpu_compute_capability", lambda: gpu)
    builder = builder_module.Builder("tensorrt", "10.3.0", 87)
    jobs = [
        make_job(tmp_path, name, builder, tmp_path, profile={}) for name in ("llm", "projector")
    ]
    assert [job["refittable"] for job in jobs] == refittable


KILLED_AT = """
import os, signal, sys
from tiny_align.engines import build, builder, engine_folder, process
from tiny_align.runtime.bundle.bundle import Bundle
path, stage, child = sys.argv[1:]
build.find_builder = lambda _target: builder.Builder("tensorrt_rtx", "1.7.1", 86)
process.COMMAND = (sys.executable, "-c", child)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write = build.write_record
replace = engine_folder.replace_folder
if stage == "first": build.run_build = die
if stage == "unrecorded": build.write_record = die
if stage == "recorded": build.write_record = lambda *a: (write(*a), die())
if stage == "unpublished": engine_folder.replace_folder = die
if stage == "published": engine_folder.replace_folder = lambda *a: (replace(*a), die())
build.build_engines(Bundle.open(path))
"""
BUILT_AGAIN = {"first": 2, "unrecorded": 2, "recorded": 1, "unpublished": 0, "published": 0}


@pytest.mark.parametrize("stage", BUILT_AGAIN)
def test_build_killed_at_any_stage_continues(child, tmp_path, stage):
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4", "cached")
    log = tmp_path / "built"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT, tmp_path, stage, FAKE_BUILD], check=False
    )
    assert killed.returncode == -9
    facts = find_builder().facts
    if stage != "published":
        with pytest.raises(BackendError, match="has no engines for"):
            check_engine(bundle, "cached", facts)
    log.write_text("")
    build_engines(bundle)
    assert len(log.read_text().split()) == BUILT_AGAIN[stage]
    assert all(check_engine(bundle, name, facts).is_file() for name in ("int4", "cached"))
    assert [p.name for p in (tmp_path / "engines").iterdir()] == ["tensorrt_rtx-1.7.1-sm86"]


def test_finished_engines_of_a_failed_build_are_not_built_again(child, tmp_path):
    bundle = make_bundle(tmp_path, "int4", "cached")
    child(FAKE_BUILD + "if graph.stem == 'int4': raise SystemExit(4)")
    with pytest.raises(BackendError, match="crashed on the graph 'int4'"):
        build_engines(bundle)
    with pytest.raises(BackendError, match=r"has no engines for .* \(found: none\)"):
        check_engine(bundle, "cached", find_builder().facts)
    child(FAKE_BUILD)
    assert list(build_engines(bundle)) == ["cached", "int4"]
    assert (tmp_path / "built").read_text().split() == ["cached", "int4", "int4"]


WAITING_CHILD = """
import json, time
from tiny_align.engines import build_one
json.load = lambda _: (print("ready", flush=True), time.sleep(60))
build_one.main()
"""
KILLED_PARENT = """
import os, signal, subprocess, sys
quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], **quiet)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_build_process_dies_with_the_command():
    """A real build process, which waits for its job."""
    command = [sys.executable, "-c", KILLED_PARENT, WAITING_CHILD]
    pid = int(subprocess.run(command, capture_output=True, check=False).stdout)
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the build process is still running")


def test_second_build_of_the_same_engines_is_refused(child, tmp_path):
    bundle = make_bundle(tmp_path, "int4")
    child(FAKE_BUILD)
    folder = tmp_path / "engines/.tensorrt_rtx-1.7.1-sm86.partial"
    with engine_folder.unfinished_folder(folder.with_name("tensorrt_rtx-1.7.1-sm86")):
        with pytest.raises(BackendError, match="another build is at work in"):
            build_engines(bundle)
        assert folder.is_dir()


def test_full_disk_is_reported_and_finished_engines_stay(rtx, tmp_path, full_disk):
    bundle = make_bundle(tmp_path, "int4", "cached")
    build_engines(bundle, graphs=["int4"])
    with (
        full_disk(8000),
        pytest.raises(
            BackendError, match=r"cannot be written \(File too large\): make room.*same command"
        ),
    ):
        build_engines(bundle)
    builder = find_builder()
    assert check_engine(bundle, "int4", builder.facts).is_file()
    assert [p.name for p in (tmp_path / "engines").iterdir()] == [builder.key]
    build_engines(bundle)
    assert check_engine(bundle, "cached", builder.facts).is_file()


class Stream:
    """A builder that streams its engine in pieces, or none; it stops if one is not written."""

    IStreamWriter = type("IStreamWriter", (), {})

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def build_serialized_network_to_stream(self, _network, _config, writer) -> bool:
        return bool(self.pieces) and all(writer.write(piece) == len(piece) for piece in self.pieces)


class Whole:
    """The builder of a TensorRT that cannot stream, such as 10.3."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def build_serialized_network(self, _network, _config):
        return b"".join(self.pieces) or None


@pytest.mark.parametrize("builder", [Stream, Whole])
def test_the_engine_is_written_in_pieces_or_whole(tmp_path, full_disk, builder):
    write = functools.partial(
        build_one.write_engine, tmp_path / "engine", Stream, network=None, config=None
    )
    write(builder=builder(b"first ", b"second"))
    assert (tmp_path / "engine").read_bytes() == b"first second"
    with pytest.raises(build_one.NotBuiltError):
        write(builder=builder())
    with full_disk(4), pytest.raises(OSError, match="File too large"):
        write(builder=builder(b"first " * 10_000, b"second"))


# ---- progress ----


def test_progress_of_nested_phases():
    phases = Phases()
    fractions = []
    phases.start("all", None, 2)
    for phase in ("parse", "optimise"):
        phases.start(phase, "all", 4)
        for step in range(4):
            phases.step(phase, step)
            fractions.append(phases.fraction)
        phases.finish(phase)
        phases.step("all", 0 if phase == "parse" else 1)
    assert fractions == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]


def test_real_builder_reports_its_progress(rtx, tmp_path):
    bundle = make_bundle(tmp_path, "int4")
    profile = graph_source(bundle, "int4")["profile"]
    job = make_job(bundle.graph("int4"), "int4", find_builder(), tmp_path, profile)
    reports = []
    result = process_module.run_build("int4", job, lambda *report: reports.append(report))
    assert result["seconds"] > 0
    fractions = [fraction for fraction, _ in reports]
    assert len(fractions) > 5 and fractions == sorted(fractions) and fractions[-1] > 0.8
    assert len({phase for _, phase in reports}) > 1


def test_no_monitor_for_a_tensorrt_without_the_interface():
    assert make_monitor(types.SimpleNamespace(), print) is None


def test_help_needs_nothing_heavy():
    """The modules that the dispatcher imports for --help load no builder."""
    heavy = ("torch", "transformers", "tensorrt", "tensorrt_rtx", "polygraphy", "onnx", "tqdm")
    script = (
        "import sys, argparse; from tiny_align.engines import command; "
        "command.add_arguments(argparse.ArgumentParser()); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


# ---- what TensorRT forbids ----

FORBIDDEN = r"'int4'.*DequantizeLinear to 'dequantised' breaks the rule 'positive scale'"


@pytest.fixture
def forbidden(child, tmp_path):
    """A bundle with a graph that TensorRT refuses and TensorRT-RTX takes."""
    child(FAKE_BUILD)
    bundle = make_bundle(tmp_path, "int4")
    save_int4(tmp_path, scale=-0.01)
    return bundle


def test_a_graph_that_tensorrt_forbids_is_refused_before_it_is_built(forbidden, monkeypatch):
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"))
    with pytest.raises(BackendError, match=f"TensorRT 10.3.0 refuses the graph {FORBIDDEN}"):
        build_engines(forbidden)
    assert not (forbidden.path / "engines").exists() and not (forbidden.path / "built").exists()
    assert list(build_engines(forbidden, force=True)) == ["int4"]


def test_tensorrt_rtx_builds_it_with_a_warning(forbidden, caplog):
    assert list(build_engines(forbidden)) == ["int4"]
    (message,) = caplog.messages
    assert re.match(f"TensorRT would refuse the graph {FORBIDDEN}", message)


def test_a_rung_that_tensorrt_forbids_is_refused(forbidden, monkeypatch):
    """As where FP16 rounds a scale to zero."""
    pretend(monkeypatch, 87, tensorrt=fake("10.3.0"))
    rung = forbidden.path / "rung"
    rung.mkdir()
    save_int4(rung, scale=0.0)
    save_int4(forbidden.path)
    selection = Selection(rung / "int4.onnx", "int4/fp16", None)
    monkeypatch.setattr(build_module, "select_precision", lambda *_: selection)
    with pytest.raises(BackendError, match=f"TensorRT 10.3.0 refuses the graph {FORBIDDEN}"):
        build_engines(forbidden)
