"""The shipped bundle is good enough: typed answers are exact, a minute trains a user's projector.

The thresholds are the project's own; benchmarks/studies/quality.py measures more voices and
speakers.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.data.non_speech import non_speech
from tiny_align.benchmarks.studies import robustness
from tiny_align.reference import corpus
from tiny_align.runtime import Assistant
from tiny_align.runtime.errors import AudioError


def test_typed_held_out_sentences_are_answered_exactly(assistant):
    sentences = corpus.sentences(800, 21, held_out=True)
    wrong = [s for s in sentences if assistant.answer_text(s.text).text != s.answer]
    assert len(wrong) <= 0.01 * len(sentences), wrong


def test_the_instruction_decides_between_answering_and_repeating(assistant):
    sentences = corpus.sentences(60, 23, held_out=True)
    for instruction in corpus.REPEAT_INSTRUCTIONS[:2]:
        n_repeated = 0
        for sentence in sentences:
            answer = assistant.answer_text(sentence.text, instruction)
            n_repeated += answer.text == sentence.text
        assert n_repeated >= 0.95 * len(sentences)


def test_non_speech_is_not_answered(assistant):
    """Hum, hiss, tones, sweeps, knocks and gusts that were in no training."""
    rng = np.random.default_rng(77)
    answered = []
    for i in range(40):
        sound = non_speech(rng, assistant.sample_rate)
        try:
            answer = assistant.answer(sound)
        except AudioError:  # too short or too quiet: refused, and that is no answer
            continue
        if answer.heard:
            answered.append((i, answer.text))
    assert not answered, answered


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    """The document of `tiny-align demo`, on one core: the shipped voice is aligned."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", "demo", "--json"]
    command += ["--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_demo_corrects_a_third_of_the_wrong_words(demo):
    """The forty answers tell less: their ROUGE-L is 0.89 or 0.91, by how a CPU rounds."""
    assert (demo["steps"], demo["ended_by"]) == (250, "steps")  # however busy the machine is
    assert demo["wer_after"] < 0.67 * demo["wer_before"]
    assert demo["rougeL_after"] > demo["rougeL_before"]
    assert demo["rougeL_after"] > 3 * demo["rougeL_chance"]


def test_the_demo_reaches_its_target(demo):
    assert demo["rougeL_before"] >= 0.85
    assert demo["rougeL_after"] >= 0.89
    assert demo["wer_after"] <= 0.16


def test_speech_in_real_conditions_is_repeated_as_well_as_plain_speech(
    demo, bundle_path, voice_path
):
    """As `run` answers files; benchmarks.studies.robustness measures sessions and `listen` too.

    A CPU's rounding in the training moves the word error rate by 0.02.
    """
    names = (
        "plain",
        "5 s before",
        "2 s inside",
        "2 s after",
        "-57 dBFS",
        "offset",
        "stereo, inverted",
    )
    test = split_of(load_dataset(voice_path), "test")
    with Assistant.load(bundle_path, "demo", users=Path(demo["path"]).parent, threads=1) as aligned:
        recordings = [(u.text, u.load(aligned.sample_rate)) for u in test]
        conditions = {name: robustness.CONDITIONS[name] for name in names}
        rows = robustness.measure(aligned, recordings, conditions, {"run": robustness.by_run})
    assert not robustness.find_failures(rows, slack=0.02), rows


def test_every_shipped_graph_computes_what_pytorch_does(assistant):
    """By figures that were measured at export and lie in the manifest."""
    graphs = assistant.bundle.manifest.graphs
    assert set(graphs) == {"encoder", "projector", "llm"}
    for graph in graphs.values():
        figures = graph.parity["max_abs_diff_to_pytorch"]
        assert len(figures) >= 4
        assert max(figures.values()) < 1e-3
