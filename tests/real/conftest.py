"""Tests with real weights, which `make pretrained` brings; without them they are skipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PRETRAINED = Path(__file__).parents[2] / "reference/pretrained"


@pytest.fixture(scope="session")
def pretrained_model():
    """The folder of a model: pretrained_model("moonshine-tiny"); skips if it is not there."""
    from tiny_align.reference.pretrained import is_complete
    from tiny_align.reference.pretrained_models import MODELS

    def find(name: str) -> Path:
        folder = PRETRAINED / name
        if not is_complete(MODELS[name], folder):
            pytest.skip(f"{folder} is not there: make pretrained")
        return folder

    return find


@pytest.fixture(scope="session")
def smollm2_fp32(pretrained_model, tmp_path_factory) -> tuple[Path, dict]:
    """Moonshine tiny and SmolLM2 in FP32: a bundle's folder, and what `tiny-align export` said."""
    folder = tmp_path_factory.mktemp("smollm2") / "bundle"
    models = ["--encoder", str(pretrained_model("moonshine-tiny"))]
    models += ["--llm", str(pretrained_model("smollm2-135m-instruct"))]
    line = ["export", *models, "--precision", "fp32", "--json", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "tiny_align.runtime.commands.cli", *line],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return folder, json.loads(done.stdout)
