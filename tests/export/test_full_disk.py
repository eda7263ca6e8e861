"""A disk that fills up during `tiny-align export`: one sentence, and no file is left."""

import functools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are exported from torch")
pytest.importorskip("transformers", reason="models are exported from transformers")
pytest.importorskip("onnx", reason="exported graphs are written with onnx")

from test_export import make_encoder  # noqa: E402 - needs the packages above

from tiny_align.benchmarks.studies.families import traced_once  # noqa: E402
from tiny_align.export import bundle as exporter  # noqa: E402
from tiny_align.export import llm_files  # noqa: E402
from tiny_align.export.graphs import Graph  # noqa: E402
from tiny_align.runtime.bundle.bundle import Bundle  # noqa: E402

ROOM = 1_000  # bytes that still fit into a file


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llm):
    """The folders of the two models; each graph is traced once."""
    torch.manual_seed(0)
    make_encoder(folder := tmp_path_factory.mktemp("encoder"))
    with traced_once("encoder_graph", "projector_graph", "llm_graph"):
        yield {"encoder": folder, "llm": tiny_llm}


def of(name: str):
    """Whether a file of that name is being written."""
    return lambda arguments: any(getattr(a, "name", "") == name for a in arguments)


# A file that is being written when the disk fills up -> its writer: owner, name, and which call.
WRITERS = {
    "the encoder": (Graph, "save", of("encoder.onnx")),
    "the projector": (Graph, "save", of("projector.onnx")),
    "the LLM in FP32": (Graph, "save", of("llm.onnx")),
    "the LLM in INT4": (llm_files, "quantise", lambda _: True),
    "the embedding table": (np, "save", of("token_embeddings.npy")),
    "the manifest": (exporter, "write_manifest", lambda _: True),
}


@pytest.fixture
def full_while(monkeypatch, full_disk):
    """From now on the disk is full whenever so much is written: full_while(place, name, when)."""

    def fill(place, name, when):
        write = getattr(place, name)

        @functools.wraps(write)
        def limited(*arguments, **named):
            if not when(arguments):
                return write(*arguments, **named)
            with full_disk(ROOM):
                return write(*arguments, **named)

        monkeypatch.setattr(place, name, limited)

    return fill


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_full_disk_is_one_sentence_and_leaves_no_file(
    refused, models, full_while, tmp_path, writer
):
    full_while(*writer)
    sentence = refused(models, tmp_path / "home/out")
    assert f"{tmp_path / 'home/out'} cannot be written (" in sentence and "make room" in sentence
    assert not list((tmp_path / "home").iterdir())


def test_older_bundle_survives_a_full_disk(refused, models, full_while, bundle_copy):
    before = Bundle.open(bundle_copy).manifest
    full_while(*WRITERS["the embedding table"])
    refused(models, bundle_copy)
    assert Bundle.open(bundle_copy).manifest == before
    assert [p.name for p in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_failure_names_the_log_and_keeps_it(run_cli, models, full_while, tmp_path):
    full_while(*WRITERS["the embedding table"])
    paths = ("--encoder", models["encoder"], "--llm", models["llm"])
    done = run_cli("export", *paths, "--out", tmp_path / "home/out")
    named, sentence = done.stderr.splitlines()
    assert named.startswith("messages of libraries: ") and sentence.startswith("tiny-align: ")
    log = Path(named.partition(": ")[2])
    assert "Loading weights" in log.read_text()
    log.unlink()
