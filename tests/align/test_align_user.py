"""`tiny-align align` on a few real recordings: what it writes, leaves unchanged and refuses.

The recordings are too few to measure how good the user's projector is.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tiny_align.align.model.projector import build_projector
from tiny_align.align.model.users import load_projector, write_user
from tiny_align.align.training.checkpoint import STATE_FILE
from tiny_align.align.training.schedule import Schedule
from tiny_align.align.training.trainer import Trainer
from tiny_align.align.training.validation import Score
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users
from tiny_align.runtime.bundle.users import check_user
from tiny_align.runtime.commands.cli import main
from tiny_align.runtime.files import sha256

STEPS, CHECK_EVERY = 60, 50
MEASURES = ("rouge1", "rougeL", "wer", "cer")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, write_recordings):
    """6 recordings to train on, 3 to test."""
    folder = tmp_path_factory.mktemp("recordings")
    write_recordings(folder, 6, 3)
    return folder


@pytest.fixture
def few_recordings(tmp_path, write_recordings):
    """3 recordings to train on, 1 to test; to be changed."""
    folder = tmp_path / "few"
    write_recordings(folder, 3, 1)
    return folder


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, bundle_path, recordings):
    """The command's document, with ana beside, not in, the shipped bundle."""
    out = tmp_path_factory.mktemp("out")
    before = contents(bundle_path)
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        arguments = ("--user", "ana", "--steps", STEPS)
        assert main(align_arguments(bundle_path, recordings, out, *arguments)) == 0
    assert contents(bundle_path) == before
    return json.loads(stdout.getvalue())


@pytest.fixture
def align(run_cli, bundle_path, few_recordings, tmp_path):
    """`align` for bo on the few recordings: align(*arguments) -> Outcome."""
    out = tmp_path / "out"

    def run(*arguments, user="bo"):
        arguments = ("--user", user, *arguments)
        return run_cli(*align_arguments(bundle_path, few_recordings, out, *arguments))

    return run


@pytest.fixture
def align_somewhere(run_cli, bundle_copy, few_recordings):
    """`align` for bo in two steps, without --out: align_somewhere(*arguments) -> Outcome."""

    def run(*arguments):
        arguments = ("--user", "bo", "--steps", 2, *arguments)
        return run_cli(*align_arguments(bundle_copy, few_recordings, None, *arguments))

    return run


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


def align_arguments(bundle, data, out, *arguments):
    command = ["align", "--bundle", bundle, "--data", data, "--threads", 1, "--json"]
    if out:
        command += ["--out", out]
    return [str(argument) for argument in (*command, *arguments)]


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def contents(folder):
    """Every file of a folder with its hash."""
    return {path.relative_to(folder): sha256(path) for path in files_of(folder)}


def written_names(users):
    return sorted(p.name for p in users.iterdir()) if users.exists() else []


def user_path(result):
    return Path(result["path"])


# --- a user is written ---


def test_the_document_holds_training_and_quality(aligned):
    got = aligned
    assert (got["user"], got["steps"], got["utterances"], got["n_test"]) == ("ana", STEPS, 6, 3)
    assert got["train_seconds"] > 0 and got["backend"] == "onnxruntime"
    for measure in MEASURES:
        for name in (f"{measure}_before", f"{measure}_after"):
            assert np.isfinite(got[name]) and got[name] >= 0
    assert 0 <= got["rougeL_chance"] <= 1 and got["normaliser"].startswith("whisper-normalizer")
    assert got["data"] == {
        "train": 6,
        "validation": 0,
        "test": 3,
        "left_out": 0,
        "reasons": [],
        "notes": [],
    }


def test_the_record_holds_hashes_and_the_training(aligned, bundle_path):
    manifest = Bundle.open(bundle_path).manifest
    folder = user_path(aligned)
    record = check_user(folder, manifest)
    assert record["embeddings_sha256"] == manifest.embeddings_sha256
    assert record["encoder_key"] == manifest.encoder_key
    hashes = {str(path): sha for path, sha in contents(folder).items()}
    del hashes["user.json"]
    assert record["files"] == hashes
    training = record["training"]
    assert training["steps"] == STEPS and training["train_seconds"] == aligned["train_seconds"]
    assert [entry["step"] for entry in training["curve"]] == [0, 50, 60]
    before = Score.from_curve(training["curve"][0])
    after = Score.from_curve(training["curve"][-1])
    assert training["improved"] == (after < before)


def test_only_the_user_and_the_features_are_left_on_disk(aligned):
    folder = user_path(aligned)
    assert written_names(folder.parent) == [".ana.align", "ana"]
    assert written_names(folder.parent / ".ana.align") == ["features"]
    assert written_names(folder) == ["projector.onnx", "projector.onnx.data", "user.json"]


def test_the_quality_afterwards_equals_that_of_eval(aligned, run_cli, bundle_path, recordings):
    users = user_path(aligned).parent
    options = ["--bundle", bundle_path, "--data", recordings, "--threads", 1]
    got = run_cli("eval", *options, "--user", "ana", "--users", users).document
    assert got["user"] == "ana" and got["n"] == 3
    assert all(got[name] == aligned[f"{name}_after"] for name in MEASURES)


def test_a_new_user_is_written_to_the_platforms_data_folder_only(
    align_somewhere, bundle_copy, empty_home
):
    before = contents(bundle_copy)
    outcome = align_somewhere()
    users = platform_users(Bundle.open(bundle_copy))
    assert outcome.status == 0 and outcome.document["path"] == str(users / "bo")
    assert written_names(users) == [".bo.align", "bo"]
    assert all(users in path.parents for path in files_of(empty_home))
    assert contents(bundle_copy) == before


def test_a_new_user_is_written_into_a_bundle_that_has_a_directory_of_users(
    align_somewhere, bundle_copy, empty_home
):
    (bundle_copy / "users").mkdir()
    outcome = align_somewhere()
    assert outcome.status == 0 and outcome.document["path"] == str(bundle_copy / "users/bo")
    bundle = Bundle.open(bundle_copy, verify=True)
    assert check_user(bundle_copy / "users/bo", bundle.manifest)["training"]["steps"] == 2
    assert not files_of(empty_home)


def test_a_user_that_an_older_version_wrote_into_the_bundle_is_trained_there(
    align_somewhere, bundle_copy, make_user, empty_home
):
    """Also if another user is in the platform's data folder."""
    bundle = Bundle.open(bundle_copy)
    own = make_user(bundle, bundle_copy / "users/bo") / "projector.onnx.data"
    ana = make_user(bundle, platform_users(bundle) / "ana")
    older = sha256(own)
    outcome = align_somewhere()
    assert outcome.status == 0 and outcome.document["path"] == str(bundle_copy / "users/bo")
    training = check_user(bundle_copy / "users/bo", bundle.manifest)["training"]
    assert training["steps"] == 2 and (sha256(own) != older) == training["improved"]
    assert {path.parent for path in files_of(empty_home)} == {ana}


def test_only_the_named_directory_of_users_is_written(
    align_somewhere, bundle_copy, tmp_path, empty_home
):
    (bundle_copy / "users").mkdir()
    outcome = align_somewhere("--users", tmp_path / "given")
    assert outcome.status == 0 and outcome.document["path"] == str(tmp_path / "given/bo")
    assert not files_of(bundle_copy / "users") and not files_of(empty_home)


def test_utterances_limits_the_train_split(align):
    got = align("--steps", 2, "--utterances", 2).document
    assert got["utterances"] == got["data"]["train"] == 2
    reason = "beyond the first 2 of the train split (--utterances)"
    assert got["data"]["reasons"] == [{"reason": reason, "count": 1, "example": "train-002.flac"}]


def test_a_second_training_begins_with_the_users_own_projector(align, bundle_path, tmp_path):
    """And no recording is encoded twice."""
    manifest = Bundle.open(bundle_path).manifest
    users = tmp_path / "out/users"
    assert align("--steps", 30).document["improved"]
    first = check_user(users / "bo", manifest)["training"]
    features = contents(users / ".bo.align")
    align("--steps", 30)
    again = check_user(users / "bo", manifest)["training"]
    assert again["curve"][0]["held_out"] == pytest.approx(first["curve"][-1]["held_out"], rel=1e-4)
    assert contents(users / ".bo.align") == features


def test_a_projector_that_does_not_improve_is_not_changed(
    align, bundle_path, tmp_path, monkeypatch
):
    users = tmp_path / "out/users"
    align("--steps", 30)
    before = sha256(users / "bo/projector.onnx.data")
    monkeypatch.setattr(Schedule, "rate", lambda schedule, peak, step, spent_s: 1.0)  # diverges
    assert not align("--steps", 30, "--seed", 1).document["improved"]
    assert sha256(users / "bo/projector.onnx.data") == before


# --- the written projector ---


@pytest.fixture(scope="module")
def written(tmp_path_factory, bundle_path):
    """A bundle, random weights, and the graph of the user they were written for."""
    bundle = Bundle.open(bundle_path)
    folder = tmp_path_factory.mktemp("written") / "users/cy"
    torch.manual_seed(5)
    projector = build_projector(bundle.manifest.projector).eval()
    write_user(bundle, folder, projector.state_dict(), {"steps": 0}, bundle.speech_tokens())
    return bundle, projector, folder / bundle.graph("projector").name


def test_written_weights_are_read_back_bit_by_bit(written):
    bundle, projector, graph = written
    again = load_projector(bundle, graph).state_dict()
    assert again.keys() == projector.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in projector.state_dict().items())


@pytest.mark.parametrize("n_frames", [3, 40, 117])
def test_onnx_runtime_agrees_with_pytorch_on_a_written_projector(written, n_frames):
    bundle, projector, graph = written
    assert_agree(bundle, projector, graph, n_frames)


def test_onnx_runtime_agrees_with_pytorch_on_a_trained_projector(aligned, bundle_path):
    bundle = Bundle.open(bundle_path)
    graph = bundle.projector("ana", user_path(aligned).parent)
    trained = load_projector(bundle, graph)
    general = load_projector(bundle, bundle.graph("projector"))
    assert_agree(bundle, trained.eval(), graph, 40)
    changed = any(not torch.equal(a, b) for a, b in zip(trained.parameters(), general.parameters()))
    assert changed == aligned["improved"]


def assert_agree(bundle, projector, graph, n_frames):
    rng = np.random.default_rng(0)
    shape = (1, n_frames, projector.config.feature_size)
    features = rng.normal(size=shape).astype(np.float32)
    with load_runner(graph, bundle.manifest.graphs["projector"], "onnxruntime", 1) as runner:
        deployed = runner({"features": features})["soft_tokens"]
    with torch.no_grad():
        difference = np.abs(deployed - projector(torch.from_numpy(features)).numpy())
    assert difference.max() < 1e-4, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


# --- interrupted ---


def make_old_user(make_user, bundle_path, users):
    folder = make_user(Bundle.open(bundle_path), users / "bo")
    return folder, contents(folder)


def test_a_killed_training_leaves_the_old_user_and_is_resumed(
    bundle_path, few_recordings, tmp_path, make_user, speech, steps_taken, run_cli
):
    users = tmp_path / "out/users"
    steps = 4 * CHECK_EVERY
    folder, old = make_old_user(make_user, bundle_path, users)
    limits = ("--steps", steps, "--max-seconds", 600)  # enough also beside other work
    arguments = align_arguments(
        bundle_path, few_recordings, tmp_path / "out", "--user", "bo", *limits
    )
    state = kill_when_there(arguments, users / ".bo.align" / STATE_FILE)

    assert contents(folder) == old
    with Assistant.load(bundle_path, "bo", users=users, threads=1) as assistant:
        assert assistant.answer(speech).tokens is not None

    outcome = run_cli(*arguments)
    assert outcome.status == 0 and outcome.document["steps"] == steps
    assert steps_taken[0] in range(0, steps, CHECK_EVERY) and steps_taken[-1] == steps - 1
    training = check_user(folder, Bundle.open(bundle_path).manifest)["training"]
    assert [entry["step"] for entry in training["curve"]] == list(range(0, steps + 1, CHECK_EVERY))
    assert contents(folder) != old and not state.exists()
    assert written_names(users) == [".bo.align", "bo"]


def kill_when_there(arguments, path, patience_s=300):
    """Run the command in a process of its own and kill it as soon as `path` exists."""
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    until = time.monotonic() + patience_s
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL and path.exists(), errors
    return path


def test_ctrl_c_exits_with_130_and_the_same_command_resumes(
    align, bundle_path, tmp_path, make_user, steps_taken, monkeypatch
):
    folder, old = make_old_user(make_user, bundle_path, tmp_path / "out/users")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at(60, Trainer.train_step))
        outcome = align("--steps", 90)
    assert (outcome.status, outcome.stdout) == (130, "") and "interrupted" in outcome.stderr
    assert contents(folder) == old

    steps_taken.clear()
    assert align("--steps", 90).document["steps"] == 90
    assert steps_taken == list(range(CHECK_EVERY, 90))


def stop_at(step, train_step):
    def stopped(trainer):
        if trainer.progress.step == step:
            raise KeyboardInterrupt
        return train_step(trainer)

    return stopped


def test_a_state_of_other_options_is_not_resumed(align, steps_taken, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at(26, Trainer.train_step))
        assert align("--steps", 27).status == 130
    steps_taken.clear()
    align("--steps", 27, "--seed", 1)
    assert steps_taken == list(range(27))


WHEN_TORCH_IS_LOADED = """
import importlib.abc, os, sys
class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Spy())
from tiny_align.runtime.commands.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [["align", "--user", "bo"], ["align", "--general"], ["demo"]])
@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(
    few_recordings, tmp_path, command, policy
):
    options = ["--bundle", str(tmp_path), "--data", str(few_recordings)]
    line = [sys.executable, "-c", WHEN_TORCH_IS_LOADED, *command, *options]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == [policy or "PASSIVE"] and "manifest" in done.stderr


# --- refused ---


def only_train(rows):
    for row in rows:
        row["split"] = "train"


def only_one_to_train(rows):
    del rows[:2]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        pytest.param(
            only_train, ["no utterances in split 'test'", "train (4)"], id="no test split"
        ),
        pytest.param(
            only_one_to_train, ["expected at least 2 recordings", "got 1"], id="one recording"
        ),
    ],
)
def test_data_that_cannot_be_used_exits_with_2_and_writes_nothing(
    align, few_recordings, change_rows, tmp_path, change, messages
):
    change_rows(few_recordings, change)
    refused(align("--steps", 2), *messages)
    assert not (tmp_path / "out").exists()


def test_a_missing_recording_exits_with_2_and_names_it(align, few_recordings, tmp_path):
    (few_recordings / "train-002.flac").unlink()
    refused(align("--steps", 2), "metadata.jsonl, line 3", "train-002.flac", "does not exist")
    assert not (tmp_path / "out").exists()


def write_unusable(folder):
    """No audio, silence, a short recording, and words outside the tokenizer, in every split.

    Returns:
        Their rows.
    """
    (folder / "none.flac").write_bytes(b"no flac")
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "short.wav", np.full(800, 0.1), 16_000)
    rows = []
    for split in ("train", "validation", "test"):
        for name in ("none.flac", "silent.wav", "short.wav"):
            rows.append({"file_name": name, "transcription": "hello", "split": split})
        rows.append({"file_name": "train-000.flac", "transcription": "漢字", "split": split})
    return rows


def test_unusable_recordings_are_left_out_and_named(align, few_recordings, change_rows, caplog):
    bad = write_unusable(few_recordings)
    change_rows(few_recordings, lambda rows: rows.extend([*bad, rows[0] | {"split": "foo"}]))
    outcome = align("--steps", 2)
    assert outcome.status == 0, outcome.stderr
    got = outcome.document
    assert (got["utterances"], got["n_test"]) == (3, 1)
    data = got["data"]
    assert [data[k] for k in ("train", "validation", "test", "left_out")] == [3, 0, 1, len(bad) + 1]
    assert sorted(entry["count"] for entry in data["reasons"]) == [1, 3, 3, 3, 3]
    assert "data: 3 train, 0 validation, 1 test used; left out 13: of split 'foo'" in outcome.stderr
    for name in ("none.flac", "silent.wav", "short.wav", "'字'"):
        assert caplog.text.count(name) >= 3


def test_too_few_usable_recordings_are_refused_with_the_reasons(
    align, few_recordings, change_rows, bundle_path, tmp_path, make_user
):
    folder, old = make_old_user(make_user, bundle_path, tmp_path / "out/users")
    for name in ("train-001.flac", "train-002.flac"):
        (few_recordings / name).write_bytes(b"no flac")
    refused(
        align("--steps", 2),
        "expected at least 2 recordings to train on",
        "got 1 (",
        "left out 2: is not audio we can read (2, e.g.",
    )
    assert contents(folder) == old


def test_a_validation_split_is_not_trained_on(align, few_recordings, change_rows, monkeypatch):
    trainers = []
    run = Trainer.run

    def recorded(trainer, *arguments):
        trainers.append(trainer)
        return run(trainer, *arguments)

    monkeypatch.setattr(Trainer, "run", recorded)
    change_rows(few_recordings, lambda rows: rows[0].update(split="dev"))
    data = align("--steps", 2).document["data"]
    assert (data["train"], data["validation"], data["test"], data["left_out"]) == (2, 1, 1, 0)
    (trainer,) = trainers
    assert (len(trainer.validation_examples), len(trainer.training_examples)) == (1, 2)


def test_an_objective_for_another_projector_exits_with_2_before_any_recording_is_read(
    align, few_recordings, tmp_path
):
    (few_recordings / "train-000.flac").write_bytes(b"never read")
    refused(
        align("--steps", 2, "--objective", "paper"), "'paper' is not for this bundle", "choose ctc"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("user", ["general", "../elsewhere", ".hidden", "a" * 65, ""])
def test_an_invalid_user_name_exits_with_2(align, tmp_path, user):
    refused(align("--steps", 2, user=user), repr(user))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", 0),
        ("--max-seconds", "nan"),
        ("--max-seconds", "0.0"),
        ("--max-seconds", "inf"),
        ("--utterances", -1),
        ("--seed", 2**32),
        ("--threads", 10_000),
    ],
)
def test_limits_out_of_range_exit_with_2(align, tmp_path, flag, value):
    refused(align(flag, value), f"{flag} is {value}: expected ")
    assert not (tmp_path / "out").exists()


def test_two_places_for_a_profile_are_refused(align, tmp_path):
    refused(align("--users", tmp_path / "users"), "--users and --out name two places")
    assert not (tmp_path / "out").exists() and not (tmp_path / "users").exists()


@pytest.mark.parametrize("place", ["--users", "--out"])
def test_the_general_projector_has_no_other_place_than_the_bundle(
    run_cli, bundle_copy, few_recordings, tmp_path, place
):
    before = contents(bundle_copy)
    arguments = ("--general", place, tmp_path / "elsewhere")
    outcome = run_cli(*align_arguments(bundle_copy, few_recordings, None, *arguments))
    refused(outcome, f"{place} is for a user's projector", f"leave {place} away")
    assert contents(bundle_copy) == before and not (tmp_path / "elsewhere").exists()


def refused(outcome, *messages):
    assert (outcome.status, outcome.stdout) == (2, "")
    for message in messages:
        assert message in outcome.stderr
