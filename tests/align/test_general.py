"""`tiny-align align --general` on many short recordings: it replaces, resumes, refuses, and keeps features on disk.

The bundle is the shipped one with a projector that knows nothing, and each recording is one spoken word: a step takes
little. What a general projector is worth after thousands of steps is not asked here.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tiny_align.align.commands import general
from tiny_align.align.commands.align import TrainingLimits
from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import Stored, array_of
from tiny_align.align.data.rehearsal import read_rehearsal
from tiny_align.align.model.objectives import make
from tiny_align.align.model.projector import ProjectorConfig, build_projector
from tiny_align.align.model.users import data_file, write_weights
from tiny_align.align.training.trainer import JUDGED, Trainer, TrainOptions
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.bundle.users import check_user
from tiny_align.runtime.files import sha256

N, STEPS = general.LEAST + 6, 4
BEGIN_S, END_S = 0.1, 0.6  # of each recording


@pytest.fixture(scope="module")
def words(voice_path, tmp_path_factory):
    """N recordings of the shipped voice, cut to about their first word, and one to test."""
    folder = tmp_path_factory.mktemp("words")
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()][
        :N
    ]
    for i, row in enumerate(rows):
        audio, rate = soundfile.read(voice_path / row["file_name"], dtype="float32")
        soundfile.write(folder / f"{i}.wav", audio[int(BEGIN_S * rate) : int(END_S * rate)], rate)
    rows = [
        {
            "file_name": f"{i}.wav",
            "transcription": row["transcription"].split()[0],
            "split": "train",
        }
        for i, row in enumerate(rows)
    ]
    lines = (json.dumps(row) + "\n" for row in [*rows, rows[0] | {"split": "test"}])
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def some_words(words, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(words, tmp_path / "words"))


@pytest.fixture
def untrained(bundle_path, tmp_path):
    """A folder with nothing but a bundle that has a random projector, no replay and a person."""
    path = tmp_path / "home/bundle"
    shutil.copytree(
        bundle_path, path, ignore=shutil.ignore_patterns("users", "engines", "replay.npz")
    )
    bundle = Bundle.open(bundle_path)
    torch.manual_seed(3)
    write_weights(
        path / data_file(bundle),
        bundle.manifest,
        build_projector(bundle.manifest.projector).state_dict(),
    )
    write_manifest(path, dataclasses.replace(bundle.manifest, projector_trained=False))
    yield path
    shutil.rmtree(path.parent)


def arguments(bundle, data, *more):
    return [
        str(a)
        for a in ("align", "--general", "--bundle", bundle, "--data", data, "--threads", 1, *more)
    ]


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): sha256(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def steps_taken(monkeypatch):
    """The steps this process trains, as a list that grows."""
    taken, step = [], Trainer._train_step
    monkeypatch.setattr(
        Trainer, "_train_step", lambda self: (taken.append(self.step), step(self))[1]
    )
    return taken


@pytest.fixture
def encoded(monkeypatch):
    """The lengths of what this process encodes, as a list that grows."""
    lengths, features = [], Assistant.features
    monkeypatch.setattr(
        Assistant,
        "features",
        lambda self, audio: (lengths.append(len(audio)), features(self, audio))[1],
    )
    return lengths


# --- what the bundle gets ---


def test_a_bundle_gets_its_general_projector_and_keeps_all_else(
    run_cli, untrained, words, make_user, tmp_path
):
    make_user(Bundle.open(untrained), untrained / "users/ana")
    (untrained / "engines/key").mkdir(parents=True)
    (untrained / "engines/key/llm.engine").write_bytes(b"engine")
    before = contents(untrained)
    done = run_cli(*arguments(untrained, words, "--steps", STEPS, "--json"))
    assert done.status == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    got = done.document
    assert (got["utterances"], got["left_out"], got["steps"], got["n_test"]) == (N, 0, STEPS, 1)
    assert got["path"] == str(untrained) and np.isfinite(got["held_out_after"])
    assert "wer_after" in got and "wer_before" not in got  # of a projector that knows nothing

    after, bundle = contents(untrained), Bundle.open(untrained)
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and changed == {
        "projector.onnx.data",
        "replay.npz",
        "manifest.json",
    }
    assert bundle.manifest.projector_trained and check_user(
        untrained / "users/ana", bundle.manifest
    )
    replayed = read_rehearsal(bundle.replay)
    assert [sum(bool(e.tokens) == said for e in replayed) for said in (True, False)] == [
        N,
        general.MIN_SOUNDS,
    ]
    assert names(untrained.parent) == [".bundle.align", "bundle"]
    assert names(untrained.parent / ".bundle.align") == ["features"]
    assert all(
        p.stat().st_nlink == 1 for p in untrained.rglob("*") if p.is_file()
    )  # the old one is gone


def test_what_gets_no_better_stays_unless_it_was_untrained(run_cli, untrained, words, monkeypatch):
    """The held-out figure is said to grow: a trained projector stays to the last byte, an untrained one goes."""
    figures = iter(range(10_000))
    monkeypatch.setattr(Trainer, "_held_out_figures", lambda trainer: (float(next(figures)),) * 2)
    before = contents(untrained)
    first = run_cli(*arguments(untrained, words, "--steps", 2)).document
    trained = contents(untrained)
    assert not first["improved"] and trained["projector.onnx.data"] != before["projector.onnx.data"]
    again = run_cli(*arguments(untrained, words, "--steps", 2)).document
    assert not again["improved"] and "wer_before" in again and contents(untrained) == trained


def test_a_trained_projector_goes_on_from_where_it_is():
    fresh, known = (
        general.options_for(16_000, "ctc", untrained, TrainingLimits())
        for untrained in (True, False)
    )
    assert (fresh.steps, fresh.flat_start, known.flat_start) == (
        4000,
        500,
        0,
    ) and not fresh.trainable
    few = general.options_for(general.LEAST, "ctc", True, TrainingLimits())
    assert few.held_out * general.LEAST >= 5 and few.steps == general.MIN_STEPS
    assert general.options_for(
        10**6, "ctc", True, TrainingLimits()
    ).held_out * 10**6 == pytest.approx(general.MAX_HELD_OUT)


# --- killed ---


def kill_when(command, ready, patience_s=120):
    """Run the command in a process of its own and end it without notice as soon as `ready()`."""
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *command]
    environment, until = {**os.environ, "OMP_NUM_THREADS": "1"}, time.monotonic() + patience_s
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as process:
        while not ready() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.kill()
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, errors


def test_killed_in_the_encoding_and_in_the_training_it_goes_on(
    run_cli, untrained, words, encoded, steps_taken
):
    command, before = arguments(untrained, words, "--steps", 12), contents(untrained)
    work = untrained.parent / ".bundle.align"
    kill_when(command, lambda: len(list(work.glob("features/*.npy"))) > 9)
    there = list(work.glob("features/*.npy"))
    assert 9 <= len(there) < N and contents(untrained) == before

    state = work / "state.safetensors"
    first = []  # the state before any step

    def trained_some():
        if state.exists():
            first[:] = first or [state.stat().st_mtime_ns]
        return bool(first) and state.exists() and state.stat().st_mtime_ns > first[0]

    kill_when(command, trained_some)
    assert contents(untrained) == before and state.exists()
    times = {p: p.stat().st_mtime_ns for p in there}

    got = run_cli(*command).document
    assert len(encoded) == 1  # the test recording; every other was on disk
    assert steps_taken[0] >= 2 and steps_taken[-1] == got["steps"] - 1 == 11
    assert {p: p.stat().st_mtime_ns for p in there} == times and not state.exists()
    assert Bundle.open(untrained).manifest.projector_trained


def test_interrupted_while_it_is_put_into_the_bundle_that_stays_whole(
    run_cli, untrained, words, monkeypatch, steps_taken
):
    before = contents(untrained)
    with monkeypatch.context() as patch:
        patch.setattr(
            "tiny_align.runtime.files._exchange",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert run_cli(*arguments(untrained, words, "--steps", 2)).status == 130
    assert contents(untrained) == before and names(untrained.parent) == [".bundle.align", "bundle"]
    steps_taken.clear()
    assert run_cli(*arguments(untrained, words, "--steps", 2)).status == 0 and steps_taken == []


# --- more than memory holds ---

SIZE, FRAMES = 64, 4096  # 1 MiB each
MANY = 3 * JUDGED


def peak_bytes(work) -> int:
    """How far the resident memory of this process rises while `work` runs, files mapped into it included."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is the kernel's")
def test_features_are_in_memory_only_while_their_batch_is(tmp_path):
    """Of 192 MiB on disk, three or four at a time are looked at."""
    examples = []
    for i in range(MANY):
        path = tmp_path / f"{i}.npy"
        np.save(path, np.full((FRAMES, SIZE), i % 7, np.float32))
        examples.append(Example(Stored(path), [i % 5], [3]))
    config = ProjectorConfig(
        feature_size=SIZE, embedding_size=8, hidden_size=8, n_layers=0, kind="mlp"
    )
    options = TrainOptions(
        "ctc",
        trainable=(),
        shortcut_threshold=None,
        batch=3,
        steps=40,
        held_out=0.02,
        check_every=20,
    )
    table = torch.randn(5, 8)

    def train():
        projector = build_projector(dataclasses.asdict(config))
        Trainer(projector, examples, make(options, table, 1.0), options, tmp_path / "work").run(
            quiet=True
        )

    while_training = peak_bytes(train)
    everything = peak_bytes(lambda: [array_of(e.features).copy() for e in examples])
    assert everything > 0.9 * MANY * 2**20  # what the measure shows where all are read
    assert while_training < 0.4 * MANY * 2**20, f"{while_training / 2**20:.0f} MiB"


def test_the_same_examples_judged_by_others_are_another_training():
    projector = build_projector(
        dataclasses.asdict(
            ProjectorConfig(feature_size=4, embedding_size=8, hidden_size=8, n_layers=0, kind="mlp")
        )
    )
    examples = [Example(np.full((3, 4), i, np.float32), [1], [3]) for i in range(3)]
    options, objective = (
        TrainOptions("ctc", trainable=(), shortcut_threshold=None),
        make(TrainOptions("ctc"), torch.randn(5, 8), 1.0),
    )
    prints = {
        Trainer(
            projector, examples[n:], objective, options, None, validation=examples[:n]
        ).fingerprint
        for n in (1, 2)
    }
    assert len(prints) == 2


# --- refused ---


def refused(outcome, *messages):
    said = [line for line in outcome.stderr.splitlines() if line.startswith("tiny-align: ")]
    assert (outcome.status, outcome.stdout, len(said)) == (2, "", 1), outcome.stderr
    assert "Traceback" not in outcome.stderr
    for message in messages:
        assert message in said[0]


@pytest.fixture
def home(untrained):
    """The bundle, held to be left as it was, with nothing but features beside it."""
    before = contents(untrained.parent)
    yield untrained
    after = contents(untrained.parent)
    assert {name: after.get(name) for name in before} == before
    assert not [
        name
        for name in after.keys() - before.keys()
        if not name.startswith(".bundle.align/features/")
    ]


def test_recordings_that_cannot_be_used_are_left_out_and_named(
    run_cli, untrained, some_words, change_rows, caplog
):
    (some_words / "3.wav").write_bytes(b"no audio")
    change_rows(some_words, lambda rows: rows[5].update(transcription="漢字"))
    got = run_cli(*arguments(untrained, some_words, "--steps", 1)).document
    assert (got["utterances"], got["left_out"]) == (N - 2, 2)
    assert "3.wav" in caplog.text and "5.wav" in caplog.text and "'字'" in caplog.text
    assert [got["data"][k] for k in ("train", "validation", "test", "left_out")] == [N - 2, 0, 1, 2]
    assert {entry["count"] for entry in got["data"]["reasons"]} == {1}


def test_a_validation_split_judges_the_training_and_test_recordings_are_optional(
    run_cli, untrained, some_words, change_rows
):
    def dev(rows):
        del rows[-1]
        for row in rows[:3]:
            row["split"] = "Dev"

    (some_words / "1.wav").write_bytes(b"no audio")
    change_rows(some_words, dev)
    got = run_cli(*arguments(untrained, some_words, "--steps", 1)).document
    assert [got["data"][k] for k in ("train", "validation", "test", "left_out")] == [N - 3, 2, 0, 1]
    assert (got["utterances"], got["n_test"]) == (N - 3, 0)


def test_too_few_recordings_are_refused_before_anything_is_heard(run_cli, home, words, encoded):
    outcome = run_cli(*arguments(home, words, "--utterances", general.LEAST - 1))
    refused(outcome, f"{general.LEAST - 1} recordings", f"needs at least {general.LEAST}")
    assert not encoded


def test_no_usable_recording_is_refused(run_cli, home, some_words, change_rows):
    def silent(rows):
        rows[0].update(transcription="漢字")
        rows[-1].update(file_name="spoken.wav")

    shutil.copyfile(some_words / "0.wav", some_words / "spoken.wav")
    for i in range(1, N):
        soundfile.write(some_words / f"{i}.wav", np.zeros(8_000), 16_000)
    change_rows(some_words, silent)
    refused(
        run_cli(*arguments(home, some_words)),
        "0 recordings that can be trained on",
        "nothing was heard (",
    )


def test_a_data_set_without_a_train_split_is_refused(run_cli, home, some_words, change_rows):
    change_rows(some_words, lambda rows: [row.update(split="test") for row in rows])
    refused(run_cli(*arguments(home, some_words)), "no utterances in split 'train'")


@pytest.fixture
def nobody(untrained, words):
    """This process without the right to write beside the bundle, even where root runs the tests."""
    folder, closed = (
        untrained.parent,
        [p for p in (words, *untrained.parents) if not p.stat().st_mode & 0o001],
    )
    modes = {path: path.stat().st_mode for path in (folder, *closed)}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    yield
    if root:
        os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_bundle_that_cannot_be_written_is_refused_before_anything_is_heard(
    run_cli, home, words, encoded, nobody
):
    refused(
        run_cli(*arguments(home, words)),
        "home cannot be written (Permission denied)",
        "you may write to",
    )
    assert not encoded


def test_a_full_disk_ends_the_encoding_which_goes_on_later(run_cli, home, words, full_disk):
    with full_disk(5_000):
        refused(
            run_cli(*arguments(home, words, "--steps", 1)),
            "features cannot be written",
            "make room",
        )


def test_a_full_disk_ends_the_training_which_goes_on_later(run_cli, home, words, full_disk):
    with full_disk(3_000_000):
        refused(run_cli(*arguments(home, words, "--steps", 1)), ".bundle.align cannot be written")


def test_a_disk_too_full_for_another_bundle_leaves_the_old_one(
    run_cli, home, words, full_disk, monkeypatch
):
    monkeypatch.setattr(
        Trainer, "_save", lambda trainer: None
    )  # the state of the training would not fit either
    with full_disk(3_000_000):
        refused(
            run_cli(*arguments(home, words, "--steps", 1)),
            "bundle cannot be written (File too large)",
        )


def test_whose_projector_must_be_said_once(run_cli, home, words, tmp_path):
    where = ("--bundle", home, "--data", words)
    assert "one of the arguments --user --general is required" in run_cli("align", *where).stderr
    assert run_cli("align", *where, "--general", "--user", "ana").status == 2
    refused(
        run_cli(*arguments(home, words, "--out", tmp_path / "out")),
        "--out is for a person's projector",
    )


def test_an_objective_for_another_projector_is_refused(run_cli, home, words):
    refused(
        run_cli(*arguments(home, words, "--objective", "paper")), "'paper' is not for this bundle"
    )
