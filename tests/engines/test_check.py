"""Engines that do not match are refused before anything loads them.

The message ends with the command that rebuilds them. The engines are real, built by TensorRT-RTX;
the check needs neither it nor a GPU.
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
    """A copy of it, to be changed."""
    shutil.copytree(built.path, tmp_path / "a bundle")
    return Bundle.open(tmp_path / "a bundle")


@pytest.fixture
def facts() -> dict:
    return find_builder(86).facts


def refusal(bundle: Bundle, facts: dict, graph: str = "cached") -> str:
    """The message of the refusal.

    Asserts that it is one sentence that ends in a valid command for this bundle.
    """
    with pytest.raises(BackendError) as refused:
        check_engine(bundle, graph, facts)
    message = str(refused.value)
    assert "\n" not in message and message.endswith("`")
    program, name, *arguments = shlex.split(message.split("`")[-2])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert (program, name) == ("tiny-align", "build-engines")
    assert parser.parse_args(arguments).bundle == bundle.path
    return message


def folder_of(bundle: Bundle):
    (folder,) = (bundle.path / "engines").iterdir()
    return folder


def rename_to(bundle: Bundle, facts: dict):
    """Give the folder the name for this machine, while its record names another one."""
    key = f"{facts['package']}-{facts['version']}-sm{facts['compute_capability']}"
    folder_of(bundle).rename(bundle.path / "engines" / key)


def export_again(bundle: Bundle, **changes) -> Bundle:
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, **changes))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize("graph", ["int4", "cached"])
def test_matching_engine_is_found(bundle, facts, graph):
    assert check_engine(bundle, graph, facts) == folder_of(bundle) / f"{graph}.engine"


def test_facts_of_this_machine_are_those_of_its_builder(built):
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
def test_engines_for_another_version_or_gpu_are_refused(bundle, facts, fact, value):
    here = {**facts, fact: value}
    message = refusal(bundle, here)
    assert f"has no engines for {here['package']}-{here['version']}-sm" in message
    assert folder_of(bundle).name in message


@pytest.mark.parametrize(
    ("fact", "value", "name"),
    [
        ("version", "1.8.0", "version"),
        ("compute_capability", 89, "compute capability"),
        ("jetpack", "36.4.3", "JetPack"),
    ],
)
def test_renamed_engines_of_another_machine_are_refused(bundle, facts, fact, value, name):
    here = {**facts, fact: value}
    rename_to(bundle, here)
    message = refusal(bundle, here)
    assert f"were built for {name}" in message
    assert f"{facts[fact] or 'none'}, this machine has {value}" in message


@pytest.mark.parametrize("file", ["cached.onnx", "cached.onnx.data"])
def test_engine_of_another_graph_or_weights_is_refused(bundle, facts, file):
    with open(bundle.path / file, "r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b"\1")
    assert f"was built from another {file} than this bundle's" in refusal(
        export_again(bundle), facts
    )


@pytest.mark.parametrize("past", [(0, 16, 65), (0, 64, 640)])
def test_profile_too_small_for_the_manifest_is_refused(bundle, facts, past):
    changed = export_again(bundle, dims={**bundle.manifest.dims, "past": past})
    message = refusal(changed, facts)
    assert "takes cache from [1, 0, 64] to [1, 64, 64]" in message
    assert f", this bundle needs [1, 0, 64] to [1, {past[2]}, 64]" in message


def test_profile_larger_than_needed_is_accepted(bundle, facts):
    smaller = export_again(bundle, dims={**bundle.manifest.dims, "past": (1, 8, 32)})
    assert check_engine(smaller, "cached", facts).is_file()


def test_input_that_the_engine_lacks_is_refused(bundle, facts):
    graph = GraphSpec(
        CACHED.file, "fp32", (*CACHED.inputs, TensorSpec("mask", "float32", (1,))), CACHED.outputs
    )
    changed = export_again(bundle, graphs={**bundle.manifest.graphs, "cached": graph})
    assert "engine.json is damaged (KeyError: 'mask')" in refusal(changed, facts)


@pytest.mark.parametrize("n_bytes", [0, 1000])
def test_truncated_engine_is_refused(bundle, facts, n_bytes):
    engine = folder_of(bundle) / "cached.engine"
    size = engine.stat().st_size
    with open(engine, "r+b") as file:
        file.truncate(n_bytes)
    expected = f"cached.engine has {n_bytes} bytes, not the {size} that were built"
    assert expected in refusal(bundle, facts)


@pytest.mark.parametrize("place", [0, -1, 5000])
def test_engine_with_a_changed_byte_is_refused(bundle, facts, place):
    engine = folder_of(bundle) / "cached.engine"
    content = bytearray(engine.read_bytes())
    content[place] ^= 1
    engine.write_bytes(content)
    assert "cached.engine has changed since it was built" in refusal(bundle, facts)
    assert check_engine(bundle, "int4", facts).is_file()


def test_missing_record_is_refused(bundle, facts):
    (folder_of(bundle) / "engine.json").unlink()
    assert "has no engine.json" in refusal(bundle, facts)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_damaged_record_is_refused(bundle, facts, text):
    (folder_of(bundle) / "engine.json").write_text(text)
    assert "engine.json is damaged" in refusal(bundle, facts)


@pytest.mark.parametrize("field", ["bytes", "engine_sha256", "graph_sha256", "files", "profile"])
def test_record_without_a_field_is_refused(bundle, facts, field, edit_json):
    edit_json(
        folder_of(bundle) / "engine.json", lambda record: record["graphs"]["cached"].pop(field)
    )
    assert f"engine.json is damaged (KeyError: '{field}')" in refusal(bundle, facts)


def test_missing_engine_is_refused(bundle, facts, edit_json):
    (folder_of(bundle) / "cached.engine").unlink()
    assert "has no engine of the graph 'cached'" in refusal(bundle, facts)
    edit_json(folder_of(bundle) / "engine.json", lambda record: record["graphs"].pop("int4"))
    assert "has no engine of the graph 'int4'" in refusal(bundle, facts, "int4")


def test_bundle_without_engines_is_refused(bundle, facts):
    shutil.rmtree(bundle.path / "engines")
    assert "(found: none)" in refusal(bundle, facts)


def test_unknown_graph_is_refused(bundle, facts):
    with pytest.raises(BundleError, match="has no graph 'decoder'"):
        check_engine(bundle, "decoder", facts)


@pytest.mark.parametrize("damage", ["truncated", "record", "graph"])
def test_the_command_in_the_message_rebuilds_the_engine(bundle, facts, damage, run_cli):
    """And builds nothing that matches."""
    if damage == "truncated":
        (folder_of(bundle) / "cached.engine").write_bytes(b"half")
    elif damage == "record":
        (folder_of(bundle) / "engine.json").unlink()
    else:
        with open(bundle.path / "cached.onnx.data", "r+b") as weights:
            weights.write(b"\1")
        bundle = export_again(bundle)
    inode = (folder_of(bundle) / "int4.engine").stat().st_ino
    command_line = refusal(bundle, facts).split("`")[-2]
    done = run_cli(*shlex.split(command_line)[1:], "--json")
    assert done.status == 0, done.stderr
    assert check_engine(bundle, "cached", facts).is_file()
    assert ((folder_of(bundle) / "int4.engine").stat().st_ino == inode) == (damage != "record")


def test_engine_is_built_from_the_plain_graph(bundle, facts):
    """Another backend's graph makes no difference."""
    plain = bundle.manifest.graphs["cached"]
    llm_ort = dataclasses.replace(plain, file="int4.onnx", inputs=())
    other = dataclasses.replace(plain, backends={"onnxruntime": llm_ort})
    changed = export_again(bundle, graphs={**bundle.manifest.graphs, "cached": other})
    assert check_engine(changed, "cached", facts).is_file()
    assert build_engines(changed, graphs=["cached"])["cached"]["files"].keys() == {
        "cached.onnx",
        "cached.onnx.data",
    }
