"""`tiny-align align --general` on many short recordings: it replaces, resumes and refuses.

The bundle is the shipped one with an untrained projector, and each recording is one spoken word, so
that a step takes little. The quality after thousands of steps is not measured here.
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

from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import Stored, array_of
from tiny_align.align.data.rehearsal import read_rehearsal
from tiny_align.align.model.objectives import make
from tiny_align.align.model.projector import ProjectorConfig, build_projector
from tiny_align.align.model.users import data_file, write_weights
from tiny_align.align.training.align_general import MIN_NON_SPEECH, MIN_STEPS, general_options
from tiny_align.align.training.checkpoint import STATE_FILE, Checkpoint
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.align.training.selection import MAX_GENERAL_VALIDATION, MIN_GENERAL_UTTERANCES
from tiny_align.align.training.trainer import Trainer, TrainOptions
from tiny_align.align.training.validation import BATCH, Score
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.bundle.users import check_user
from tiny_align.runtime.files import sha256

N = MIN_GENERAL_UTTERANCES + 6
STEPS = 4
START_S, END_S = 0.1, 0.6  # of each recording


@pytest.fixture(scope="module")
def words(voice_path, tmp_path_factory):
    """N recordings of the shipped voice, cut to about their first word, and one to test."""
    folder = tmp_path_factory.mktemp("words")
    lines = (voice_path / "metadata.jsonl").read_text().splitlines()[:N]
    rows = []
    for i, line in enumerate(lines):
        row = json.loads(line)
        audio, rate = soundfile.read(voice_path / row["file_name"], dtype="float32")
        soundfile.write(folder / f"{i}.wav", audio[int(START_S * rate) : int(END_S * rate)], rate)
        word = row["transcription"].split()[0]
        rows.append({"file_name": f"{i}.wav", "transcription": word, "split": "train"})
    rows.append(rows[0] | {"split": "test"})
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def some_words(words, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(words, tmp_path / "words"))


@pytest.fixture
def untrained(bundle_path, tmp_path):
    """A folder with nothing but a bundle that has a random projector and no rehearsal data."""
    path = tmp_path / "home/bundle"
    ignore = shutil.ignore_patterns("users", "engines", "replay.npz")
    shutil.copytree(bundle_path, path, ignore=ignore)
    bundle = Bundle.open(bundle_path)
    torch.manual_seed(3)
    projector = build_projector(bundle.manifest.projector)
    write_weights(path / data_file(bundle), bundle.manifest, projector.state_dict())
    write_manifest(path, dataclasses.replace(bundle.manifest, projector_trained=False))
    yield path
    shutil.rmtree(path.parent)


def arguments(bundle, data, *more):
    command = ("align", "--general", "--bundle", bundle, "--data", data, "--threads", 1, *more)
    return [str(argument) for argument in command]


def contents(folder):
    """Every file of a folder with its hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def steps_taken(monkeypatch):
    """The steps that this process trains, as a list that grows."""
    taken = []
    train_step = Trainer.train_step

    def recorded(trainer):
        taken.append(trainer.progress.step)
        return train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", recorded)
    return taken


@pytest.fixture
def encoded(monkeypatch):
    """The lengths of what this process encodes, as a list that grows."""
    lengths = []
    features = Assistant.features

    def recorded(assistant, audio):
        lengths.append(len(audio))
        return features(assistant, audio)

    monkeypatch.setattr(Assistant, "features", recorded)
    return lengths


# --- the bundle afterwards ---


def test_a_general_training_changes_the_projector_and_nothing_else(
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
    assert "wer_after" in got and "wer_before" not in got  # of an untrained projector

    after = contents(untrained)
    bundle = Bundle.open(untrained)
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    assert changed == {"projector.onnx.data", "replay.npz", "manifest.json"}
    assert bundle.manifest.projector_trained
    assert check_user(untrained / "users/ana", bundle.manifest)
    rehearsal = read_rehearsal(bundle.replay)
    n_spoken = sum(bool(example.tokens) for example in rehearsal)
    assert (n_spoken, len(rehearsal) - n_spoken) == (N, MIN_NON_SPEECH)
    assert names(untrained.parent) == [".bundle.align", "bundle"]
    assert names(untrained.parent / ".bundle.align") == ["features"]
    files = [path for path in untrained.rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 for path in files)  # the old bundle is gone


def test_a_projector_that_does_not_improve_stays_unless_it_was_untrained(
    run_cli, untrained, words, monkeypatch
):
    """Every score is worse than the one before: a trained projector stays to the last byte."""
    errors = iter(range(10_000))
    monkeypatch.setattr(
        Trainer, "validation_score", lambda trainer: Score(float(next(errors)), loss=0.0)
    )
    before = contents(untrained)
    first = run_cli(*arguments(untrained, words, "--steps", 2)).document
    trained = contents(untrained)
    assert not first["improved"] and trained["projector.onnx.data"] != before["projector.onnx.data"]
    again = run_cli(*arguments(untrained, words, "--steps", 2)).document
    assert not again["improved"] and "wer_before" in again and contents(untrained) == trained


def test_only_an_untrained_projector_has_a_flat_start():
    untrained = options_for(16_000, untrained=True)
    trained = options_for(16_000, untrained=False)
    assert (untrained.steps, untrained.flat_start, untrained.trainable) == (4000, 500, ())
    assert trained.flat_start == 0


def test_steps_and_held_out_share_follow_the_number_of_utterances():
    few = options_for(MIN_GENERAL_UTTERANCES)
    assert few.held_out * MIN_GENERAL_UTTERANCES >= 5 and few.steps == MIN_STEPS
    many = options_for(10**6)
    assert many.held_out * 10**6 == pytest.approx(MAX_GENERAL_VALIDATION)


def options_for(n_utterances, untrained=True):
    return general_options(n_utterances, "ctc", untrained, TrainingLimits())


# --- killed ---


def kill_when(command, ready, patience_s=120):
    """Run the command in a process of its own and kill it as soon as `ready()`."""
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    until = time.monotonic() + patience_s
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        while not ready() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.kill()
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, errors


def test_a_killed_encoding_and_a_killed_training_are_resumed(
    run_cli, untrained, words, encoded, steps_taken
):
    command = arguments(untrained, words, "--steps", 12)
    before = contents(untrained)
    work = untrained.parent / ".bundle.align"
    kill_when(command, lambda: len(list(work.glob("features/*.npy"))) > 9)
    encoded_first = list(work.glob("features/*.npy"))
    assert 9 <= len(encoded_first) < N and contents(untrained) == before

    state = work / STATE_FILE
    times_written = set()

    def took_some_steps():
        if state.exists():
            times_written.add(state.stat().st_mtime_ns)
        return len(times_written) > 1  # the first state is of before any step

    kill_when(command, took_some_steps)
    assert contents(untrained) == before and state.exists()
    times = {path: path.stat().st_mtime_ns for path in encoded_first}

    got = run_cli(*command).document
    assert len(encoded) == 1  # the test recording; all others were on disk
    assert steps_taken[0] >= 2 and steps_taken[-1] == got["steps"] - 1 == 11
    assert {path: path.stat().st_mtime_ns for path in encoded_first} == times
    assert not state.exists()
    assert Bundle.open(untrained).manifest.projector_trained


def test_the_bundle_stays_whole_if_its_replacement_is_interrupted(
    run_cli, untrained, words, monkeypatch, steps_taken
):
    def interrupted(new, target):
        raise KeyboardInterrupt

    before = contents(untrained)
    with monkeypatch.context() as patch:
        patch.setattr("tiny_align.runtime.files._exchange", interrupted)
        assert run_cli(*arguments(untrained, words, "--steps", 2)).status == 130
    assert contents(untrained) == before and names(untrained.parent) == [".bundle.align", "bundle"]
    steps_taken.clear()
    assert run_cli(*arguments(untrained, words, "--steps", 2)).status == 0 and steps_taken == []


# --- more than memory holds ---

SIZE, FRAMES = 64, 4096  # 1 MiB each
MANY = 3 * BATCH


def peak_bytes(work) -> int:
    """How far this process's resident memory rises while `work` runs, mapped files included."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not be used again
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_status("VmRSS")
    work()
    return process_status("VmHWM") - before


def process_status(name: str) -> int:
    """Bytes of a line in the kernel's status of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is the kernel's")
def test_features_are_in_memory_only_while_their_batch_is(tmp_path):
    """Of 192 MiB on disk, three or four are in use at a time."""
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
        objective = make(options, table, 1.0)
        Trainer(projector, examples, objective, options, tmp_path / "work").run(quiet=True)

    while_training = peak_bytes(train)
    everything = peak_bytes(lambda: [array_of(e.features).copy() for e in examples])
    assert everything > 0.9 * MANY * 2**20  # the measure works: all are read
    assert while_training < 0.4 * MANY * 2**20, f"{while_training / 2**20:.0f} MiB"


def test_another_split_of_the_same_examples_is_another_training():
    config = ProjectorConfig(
        feature_size=4, embedding_size=8, hidden_size=8, n_layers=0, kind="mlp"
    )
    projector = build_projector(dataclasses.asdict(config))
    examples = [Example(np.full((3, 4), i, np.float32), [1], [3]) for i in range(3)]
    options = TrainOptions("ctc", trainable=(), shortcut_threshold=None)
    objective = make(options, torch.randn(5, 8), 1.0)
    fingerprints = set()
    for n in (1, 2):
        trainer = Trainer(
            projector, examples[n:], objective, options, None, validation=examples[:n]
        )
        fingerprints.add(trainer.fingerprint)
    assert len(fingerprints) == 2


# --- refused ---


def refused(outcome, *messages):
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("tiny-align: ")]
    assert (outcome.status, outcome.stdout, len(errors)) == (2, "", 1), outcome.stderr
    assert "Traceback" not in outcome.stderr
    for message in messages:
        assert message in errors[0]


@pytest.fixture
def unchanged(untrained):
    """The bundle; afterwards it must be as before, with nothing but features beside it."""
    before = contents(untrained.parent)
    yield untrained
    after = contents(untrained.parent)
    assert {name: after.get(name) for name in before} == before
    added = after.keys() - before.keys()
    assert all(name.startswith(".bundle.align/features/") for name in added)


def test_unusable_recordings_are_left_out_and_named(
    run_cli, untrained, some_words, change_rows, caplog
):
    (some_words / "3.wav").write_bytes(b"no audio")
    change_rows(some_words, lambda rows: rows[5].update(transcription="漢字"))
    got = run_cli(*arguments(untrained, some_words, "--steps", 1)).document
    assert (got["utterances"], got["left_out"]) == (N - 2, 2)
    assert "3.wav" in caplog.text and "5.wav" in caplog.text and "'字'" in caplog.text
    assert [got["data"][k] for k in ("train", "validation", "test", "left_out")] == [N - 2, 0, 1, 2]
    assert {entry["count"] for entry in got["data"]["reasons"]} == {1}


def test_a_validation_split_is_not_trained_on_and_a_test_split_is_optional(
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


def test_too_few_recordings_are_refused_before_any_is_encoded(run_cli, unchanged, words, encoded):
    n = MIN_GENERAL_UTTERANCES - 1
    outcome = run_cli(*arguments(unchanged, words, "--utterances", n))
    refused(outcome, f"expected at least {MIN_GENERAL_UTTERANCES} recordings", f"got {n}")
    assert not encoded


def test_no_usable_recording_is_refused(run_cli, unchanged, some_words, change_rows):
    def silent(rows):
        rows[0].update(transcription="漢字")
        rows[-1].update(file_name="spoken.wav")

    shutil.copyfile(some_words / "0.wav", some_words / "spoken.wav")
    for i in range(1, N):
        soundfile.write(some_words / f"{i}.wav", np.zeros(8_000), 16_000)
    change_rows(some_words, silent)
    refused(
        run_cli(*arguments(unchanged, some_words)),
        f"expected at least {MIN_GENERAL_UTTERANCES} recordings",
        "got 0 (",
        "nothing was heard (",
    )


def test_a_data_set_without_a_train_split_is_refused(run_cli, unchanged, some_words, change_rows):
    change_rows(some_words, lambda rows: [row.update(split="test") for row in rows])
    refused(run_cli(*arguments(unchanged, some_words)), "no utterances in split 'train'")


@pytest.fixture
def no_write_permission(untrained, words):
    """This process without the right to write beside the bundle, even if root runs the tests."""
    folder = untrained.parent
    closed = [p for p in (words, *untrained.parents) if not p.stat().st_mode & 0o001]
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


def test_a_bundle_that_cannot_be_written_is_refused_before_any_recording_is_encoded(
    run_cli, unchanged, words, encoded, no_write_permission
):
    refused(
        run_cli(*arguments(unchanged, words)),
        "home cannot be written (Permission denied)",
        "you may write to",
    )
    assert not encoded


def test_a_full_disk_in_the_encoding_is_refused(run_cli, unchanged, words, full_disk):
    with full_disk(5_000):
        refused(
            run_cli(*arguments(unchanged, words, "--steps", 1)),
            "features cannot be written",
            "make room",
        )


def test_a_full_disk_in_the_training_is_refused(run_cli, unchanged, words, full_disk):
    with full_disk(3_000_000):
        refused(
            run_cli(*arguments(unchanged, words, "--steps", 1)), ".bundle.align cannot be written"
        )


def test_a_disk_too_full_for_another_bundle_leaves_the_old_one(
    run_cli, unchanged, words, full_disk, monkeypatch
):
    # the state of the training would not fit either
    monkeypatch.setattr(Checkpoint, "save", lambda checkpoint, *state: None)
    with full_disk(3_000_000):
        refused(
            run_cli(*arguments(unchanged, words, "--steps", 1)),
            "bundle cannot be written (File too large)",
        )


def test_exactly_one_of_user_and_general_is_required(run_cli, unchanged, words, tmp_path):
    where = ("--bundle", unchanged, "--data", words)
    assert "one of the arguments --user --general is required" in run_cli("align", *where).stderr
    assert run_cli("align", *where, "--general", "--user", "ana").status == 2
    refused(
        run_cli(*arguments(unchanged, words, "--out", tmp_path / "out")),
        "--out is for a user's projector",
    )


def test_an_objective_for_another_projector_is_refused(run_cli, unchanged, words):
    refused(
        run_cli(*arguments(unchanged, words, "--objective", "paper")),
        "'paper' is not for this bundle",
    )
