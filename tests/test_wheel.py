"""The built wheel, away from the checkout: it holds the reference bundle, the demo runs from it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # an earlier build's old files would get in
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "-w", out, ROOT], check=True, env=environment)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_stages_and_reference(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = (
        "runtime/commands/cli.py",
        "align/training/trainer.py",
        "export/graphs.py",
        "engines/build.py",
        "reference/corpus.py",
        "benchmarks/standard/command.py",
    )
    for name in modules:
        assert f"tiny_align/{name}" in names
    manifest = json.loads((ROOT / "reference/bundle/manifest.json").read_text())
    for name in ("manifest.json", *manifest["files"]):
        assert f"tiny_align/reference/bundle/{name}" in names
    assert "tiny_align/reference/voice/metadata.jsonl" in names
    assert "tiny_align_telemetry_off.pth" in names  # executed at Python's start: setup.py
    for stage in ("runtime", "align", "export", "engines"):
        assert f"tiny_align/{stage}/py.typed" in names
    for name in names:
        assert not name.startswith("tests/")
        for folder in ("weights/", "/studies/", "/users/", "/results/"):
            assert folder not in name


def test_the_demo_runs_from_the_wheel(wheel, tmp_path):
    """Unpacked into an empty folder, which precedes the checkout's own packages on the path."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = f"""
import sys
sys.path[:] = [p for p in sys.path if not p.startswith("__editable__")]
sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in repr(f)]
sys.path.insert(0, {str(site)!r})
from tiny_align.runtime.commands import cli
assert cli.__file__.startswith(sys.path[0])
sys.exit(cli.main(["demo", "--steps", "2", "--utterances", "4", "--json", "--out", "out"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    figures = {
        "rougeL_before",
        "rougeL_after",
        "wer_before",
        "wer_after",
        "train_seconds",
        "ttft_ms",
        "rtf",
        "backend",
    }
    assert figures <= set(result)
    assert (tmp_path / "out/users/demo/projector.onnx").exists()
