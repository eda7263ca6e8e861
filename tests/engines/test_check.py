"""Engines that do not fit are refused in one sentence with the command that rebuilds them, before anything loads them.

The engines are real ones of TensorRT-RTX; checking needs neither it nor a GPU.
"""

import argparse
import dataclasses
import shlex
import shutil

import pytest
from test_build import CACHED, make_bundle

from tiny_align.engines import command
from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import check_engine, machine_facts
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec, write_manifest
from tiny_align.runtime.errors import BackendError, BundleError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle with real engines; read only."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what builds engines without a GPU")
    bundle = make_bundle(tmp_path_factory.mktemp("built") / "bundle", "int4", "cached")
    build_engines(bundle, compute_capability=86)
    return bundle


@pytest.fixture
def bundle(built, tmp_path) -> Bundle:
    """The same, to be changed."""
    shutil.copytree(built.path, tmp_path / "a bundle")
    return Bundle.open(tmp_path / "a bundle")


@pytest.fixture
def facts() -> dict:
    return find_builder(86).facts


def refusal(bundle: Bundle, facts: dict, graph: str = "cached") -> str:
    """What is said, after checking that it is one sentence whose command is one of ours and names this bundle."""
    with pytest.raises(BackendError) as refused:
        check_engine(bundle, graph, facts)
    said = str(refused.value)
    assert "\n" not in said and said.endswith("`")
    program, name, *arguments = shlex.split(said.split("`")[-2])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert (program, name) == ("tiny-align", "build-engines")
    assert parser.parse_args(arguments).bundle == bundle.path
    return said


def folder_of(bundle: Bundle):
    (folder,) = (bundle.path / "engines").iterdir()
    return folder


def rename_to(bundle: Bundle, facts: dict):
    """What somebody does who wants it to fit: the folder's name says this machine, the record another one."""
    key = f"{facts['package']}-{facts['version']}-sm{facts['compute_capability']}"
    folder_of(bundle).rename(bundle.path / "engines" / key)


def exported_again(bundle: Bundle, **changes) -> Bundle:
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, **changes))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("graph", ["int4", "cached"])
def test_an_engine_that_fits_is_given(bundle, facts, graph):
    assert check_engine(bundle, graph, facts) == folder_of(bundle) / f"{graph}.engine"


def test_the_facts_of_this_machine_are_those_of_its_builder(built):
    builder = find_builder()
    facts = machine_facts(builder.package, builder.version)
    assert {**facts, "compute_capability": facts["compute_capability"] or 86} == builder.facts


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("version", "1.8.0"),
        ("compute_capability", 89),
        ("package", "tensorrt"),
        ("compute_capability", None),
    ],
)
def test_another_version_or_gpu(bundle, facts, fact, value):
    here = {**facts, fact: value}
    said = refusal(bundle, here)
    assert (
        f"has no engines for {here['package']}-{here['version']}-sm" in said
        and folder_of(bundle).name in said
    )


@pytest.mark.parametrize(
    ("fact", "value", "name"),
    [
        ("version", "1.8.0", "version"),
        ("compute_capability", 89, "compute capability"),
        ("jetpack", "36.4.3", "JetPack"),
    ],
)
def test_another_machine_under_this_ones_name(bundle, facts, fact, value, name):
    here = {**facts, fact: value}
    rename_to(bundle, here)
    assert f"were built for {name}" in (said := refusal(bundle, here))
    assert f"{facts[fact] or 'none'}, this machine has {value}" in said


@pytest.mark.parametrize("file", ["cached.onnx", "cached.onnx.data"])
def test_another_graph_or_other_weights(bundle, facts, file):
    with open(bundle.path / file, "r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b"\1")
    assert f"was built from another {file} than this bundle's" in refusal(
        exported_again(bundle), facts
    )


@pytest.mark.parametrize("past", [(0, 16, 65), (0, 64, 640)])
def test_a_profile_too_small_for_the_manifest(bundle, facts, past):
    said = refusal(exported_again(bundle, dims={**bundle.manifest.dims, "past": past}), facts)
    assert (
        f"takes cache from [1, 0, 64] to [1, 64, 64], this bundle needs [1, 0, 64] to [1, {past[2]}, 64]"
        in said
    )


def test_a_profile_that_is_larger_than_needed_will_do(bundle, facts):
    smaller = exported_again(bundle, dims={**bundle.manifest.dims, "past": (1, 8, 32)})
    assert check_engine(smaller, "cached", facts).is_file()


def test_an_input_that_the_engine_does_not_have(bundle, facts):
    graph = GraphSpec(
        CACHED.file, "fp32", (*CACHED.inputs, TensorSpec("mask", "float32", (1,))), CACHED.outputs
    )
    said = refusal(
        exported_again(bundle, graphs={**bundle.manifest.graphs, "cached": graph}), facts
    )
    assert "engine.json is damaged (KeyError: 'mask')" in said


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_truncated_engine(bundle, facts, kept):
    engine = folder_of(bundle) / "cached.engine"
    size = engine.stat().st_size
    with open(engine, "r+b") as file:
        file.truncate(kept)
    assert f"cached.engine has {kept} bytes, not the {size} that were built" in refusal(
        bundle, facts
    )


@pytest.mark.parametrize("place", [0, -1, 5000])
def test_a_changed_byte(bundle, facts, place):
    engine = folder_of(bundle) / "cached.engine"
    content = bytearray(engine.read_bytes())
    content[place] ^= 1
    engine.write_bytes(content)
    assert "cached.engine has changed since it was built" in refusal(bundle, facts)
    assert check_engine(bundle, "int4", facts).is_file()


def test_a_missing_record(bundle, facts):
    (folder_of(bundle) / "engine.json").unlink()
    assert "has no engine.json" in refusal(bundle, facts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_a_damaged_record(bundle, facts, text):
    (folder_of(bundle) / "engine.json").write_text(text)
    assert "engine.json is damaged" in refusal(bundle, facts)


@pytest.mark.parametrize("field", ["bytes", "engine_sha256", "graph_sha256", "files", "profile"])
def test_a_record_that_lacks_something(bundle, facts, field, edit_json):
    edit_json(
        folder_of(bundle) / "engine.json", lambda record: record["graphs"]["cached"].pop(field)
    )
    assert f"engine.json is damaged (KeyError: '{field}')" in refusal(bundle, facts)


def test_an_absent_engine(bundle, facts, edit_json):
    (folder_of(bundle) / "cached.engine").unlink()
    assert "has no engine of the graph 'cached'" in refusal(bundle, facts)
    edit_json(folder_of(bundle) / "engine.json", lambda record: record["graphs"].pop("int4"))
    assert "has no engine of the graph 'int4'" in refusal(bundle, facts, "int4")


def test_no_engines_at_all(bundle, facts):
    shutil.rmtree(bundle.path / "engines")
    assert "(found: none)" in refusal(bundle, facts)


def test_a_graph_that_the_bundle_does_not_have(bundle, facts):
    with pytest.raises(BundleError, match="has no graph 'decoder'"):
        check_engine(bundle, "decoder", facts)


@pytest.mark.parametrize("damage", ["truncated", "record", "graph"])
def test_the_command_that_was_named_mends_it(bundle, facts, damage, run_cli):
    """And builds nothing that fits."""
    if damage == "truncated":
        (folder_of(bundle) / "cached.engine").write_bytes(b"half")
    elif damage == "record":
        (folder_of(bundle) / "engine.json").unlink()
    else:
        with open(bundle.path / "cached.onnx.data", "r+b") as weights:
            weights.write(b"\1")
        bundle = exported_again(bundle)
    inode = (folder_of(bundle) / "int4.engine").stat().st_ino
    said = refusal(bundle, facts)
    done = run_cli(*shlex.split(said.split("`")[-2])[1:], "--json")
    assert done.status == 0, done.stderr
    assert check_engine(bundle, "cached", facts).is_file()
    assert ((folder_of(bundle) / "int4.engine").stat().st_ino == inode) == (damage != "record")


def test_the_engine_is_of_the_plain_graph(bundle, facts):
    """Another backend's graph is of no concern."""
    plain = bundle.manifest.graphs["cached"]
    fused = dataclasses.replace(plain, file="int4.onnx", inputs=())
    other = dataclasses.replace(plain, backends={"onnxruntime": fused})
    changed = exported_again(bundle, graphs={**bundle.manifest.graphs, "cached": other})
    assert check_engine(changed, "cached", facts).is_file()
    assert build_engines(changed, graphs=["cached"])["cached"]["files"].keys() == {
        "cached.onnx",
        "cached.onnx.data",
    }
