"""benchmarks/jetson.sh as it runs on this machine, and with recorded results of TensorRT."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tiny_align.benchmarks.studies import jetson
from tiny_align.runtime.commands.cli import COMMANDS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "jetson.sh"
# stubs for the script's PYTHON: one builds a single engine, the other has results of TensorRT
WITH_ONE_ENGINE = """#!/bin/sh
case "$*" in *build-engines*) exec {python} "$@" --graph projector ;; esac
exec {python} "$@"
"""
WITH_TENSORRT = """#!/bin/sh
case "$*" in
    *"can build"*) echo "no builder"; exit 3 ;;
    *"can tensorrt"*) exit 0 ;;
    *"measure --backend"*) cat {recorded}/$5.json; cp {recorded}/$5.npz {out} ;;
    *"runtime.commands.cli doctor"*) {doctor} ;;
    *"benchmarks.studies.swap"*) echo '{{"build_s": 0.5}}' ;;
    *) exec {python} "$@" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a script for bash")


def run(out: Path, python: str, *options: object) -> tuple[int, dict, str]:
    """Exit status, document and stderr of the script; `python` is the text of its interpreter."""
    stub = out.with_suffix(".sh")
    stub.write_text(python)
    stub.chmod(0o755)
    command = ["bash", str(SCRIPT), "--out", str(out), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": str(stub)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def states(document: dict) -> dict[str, str]:
    return {name: step["state"] for name, step in document["steps"].items()}


def test_without_a_gpu_every_other_step_is_done(tmp_path, bundle_copy):
    if jetson.problem_with("build") or not jetson.problem_with("tensorrt"):
        pytest.skip("for a machine that builds engines and cannot run them")
    python = WITH_ONE_ENGINE.format(python=sys.executable)
    status, document, errors = run(tmp_path / "out", python, "--quick", "--bundle", bundle_copy)
    assert status == 0, errors
    assert states(document) == {
        "doctor": "done",
        "build": "done",
        "measure-onnxruntime": "done",
        "measure-tensorrt": "left out",
        "swap": "left out",
        "parity": "done",
        "doctor-after": "done",
    }
    results = document["results"]
    assert list(results["build"]["engines"]) == ["projector"]
    assert results["measure-onnxruntime"]["recordings"] == 2
    ttft_ms = results["measure-onnxruntime"]["ttft_ms"]
    assert 0 < ttft_ms["median"] <= ttft_ms["p90"]
    assert document["steps"]["measure-tensorrt"]["reason"]
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"report.json", "doctor.json", "build.json", "onnxruntime.npz", "steps.tsv"} <= names


@pytest.fixture
def recorded(tmp_path):
    """What `measure` writes for both backends, by a function.

    It takes the noise in TensorRT's features, its answer and its ROUGE-L.
    """
    folder = tmp_path / "recorded"
    folder.mkdir()

    def write(backend: str, features: np.ndarray, text: str, rouge: float) -> None:
        figure = {"median": 1.0, "p90": 1.0}
        document = {
            "backend": backend,
            "recordings": 1,
            "shipped": False,
            "texts": [text],
            "peak_memory_bytes": 1,
            "memory_taken_bytes": 1,
            "ttft_ms": figure,
            "ms_per_token": figure,
            "rtf": figure,
            "quality": {"rougeL": rouge},
        }
        (folder / f"{backend}.json").write_text(json.dumps(document))
        np.savez(folder / f"{backend}.npz", **{"0": features})

    def write_both(noise: float, text: str, rouge: float) -> Path:
        exact = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
        write("onnxruntime", exact, "the light is on", 0.9)
        write("tensorrt", exact + noise * exact[::-1], text, rouge)
        return folder

    return write_both


def python_with_tensorrt(folder: Path, out: Path, doctor: str = "echo {}") -> str:
    return WITH_TENSORRT.format(python=sys.executable, recorded=folder, out=out, doctor=doctor)


def test_a_backend_on_a_par_with_onnx_runtime_passes(tmp_path, recorded):
    out = tmp_path / "out"
    python = python_with_tensorrt(recorded(0.01, "the light is on", 0.89), out)
    status, document, errors = run(out, python)
    assert status == 0, errors
    assert document["steps"]["build"] == {"state": "left out", "reason": "no builder"}
    row = document["results"]["parity"]["tensorrt"]
    assert row["on_a_par"]
    assert row["least_cosine"] > 0.999
    assert row["same_answers"] == 1.0
    assert row["loss"] == pytest.approx(0.01)


def test_a_failed_step_fails_the_script_and_stops_no_other(tmp_path, recorded):
    out = tmp_path / "out"
    results = recorded(0.5, "the light is off", 0.7)
    python = python_with_tensorrt(results, out, doctor="echo broken >&2; exit 1")
    status, document, errors = run(out, python)
    assert status == 1
    assert states(document) == {
        "doctor": "failed",
        "build": "left out",
        "measure-onnxruntime": "done",
        "measure-tensorrt": "done",
        "swap": "done",
        "parity": "failed",
        "doctor-after": "failed",
    }
    assert not document["results"]["parity"]["tensorrt"]["on_a_par"]
    assert (out / "doctor.log").read_text() == "broken\n"
    assert "broken" in errors


@pytest.mark.parametrize("call", [["--bundle"], ["--loud"], ["--bundle", "/nowhere"]])
def test_wrong_options_exit_with_2_and_an_error(call):
    done = subprocess.run(["bash", str(SCRIPT), *call], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("jetson.sh: ")
    assert not done.stdout


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        ({}, True),
        ({"least_cosine": 0.995, "loss": 0.02}, True),
        ({"least_cosine": 0.98}, False),
        ({"loss": 0.03}, False),
        ({"loss_to_reference": 0.03}, False),
        ({"loss": -0.5, "loss_to_reference": -0.5}, True),
        ({"least_cosine": float("nan")}, False),
    ],
)
def test_on_a_par_is_a_high_cosine_and_a_low_loss(row, passes):
    assert jetson.is_on_a_par(row) is passes


def test_the_guide_names_existing_commands_and_files():
    root = SCRIPT.parents[1]
    guide = (root / "docs/jetson.md").read_text(encoding="utf-8")
    assert set(re.findall(r"tiny-align ([a-z-]+)[ `\n]", guide)) <= set(COMMANDS)
    files = re.findall(r"\b(?:docker|benchmarks|reference)/[\w./-]+\w", guide)
    missing = {name for name in files if not (root / name).exists()}
    assert len(files) > 8
    assert missing <= {"reference/bundle/engines"}
