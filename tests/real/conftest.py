"""Tests with real weights, which `make pretrained` brings; without them they are skipped."""

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
