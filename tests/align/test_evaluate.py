"""Alignment quality: its arithmetic on a scripted assistant, the rest on the shipped bundle."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users

REPEAT = "Repeat it."
DATA_KEYS = {
    "rouge1",
    "rougeL",
    "rougeL_chance",
    "wer",
    "cer",
    "n",
    "normaliser",
    "backend",
    "user",
    "data",
}


@dataclass(frozen=True)
class Line:
    """An utterance of the script; its audio is the line itself."""

    text: str
    typed: str
    spoken: str
    repeated: str = ""
    audio: Path = Path("a.wav")
    split: str = "test"

    def load(self, sample_rate):
        return self


class ScriptedAssistant:
    """Answers as the script says, and records the instructions it gets."""

    sample_rate = 16_000
    bundle = SimpleNamespace(
        manifest=SimpleNamespace(prompt=SimpleNamespace(repeat_instruction=REPEAT))
    )
    llm = SimpleNamespace(encode_words=lambda text, where: [0])

    def __init__(self, script):
        self.script = {line.text: line for line in script}
        self.instructions = []

    def features(self, audio):
        return audio

    def soft_tokens(self, features):
        return features

    def answer_text(self, text, instruction):
        self.instructions.append(("typed", instruction))
        return SimpleNamespace(text=self.script[text].typed)

    def answer_soft_tokens(self, soft_tokens, instruction):
        self.instructions.append(("spoken", instruction))
        text = soft_tokens.repeated if instruction == REPEAT else soft_tokens.spoken
        return SimpleNamespace(text=text)


def quality(*script, instruction=None):
    return evaluate(ScriptedAssistant(script), list(script), instruction, quiet=True)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, write_recordings):
    """2 recordings to train on, 1 to test."""
    folder = tmp_path_factory.mktemp("recordings")
    write_recordings(folder, 2, 1)
    return folder


# --- the figures ---


def test_answers_equal_to_the_typed_ones_have_no_errors():
    got = quality(
        Line("hi", "good day", "good day", "hi"), Line("bye now", "see you", "see you", "bye now")
    )
    assert (got.rouge1, got.rougeL, got.wer, got.cer, got.n) == (1, 1, 0, 0, 2)


def test_rouge_is_the_mean_over_the_utterances():
    got = quality(Line("a", "one two", "one two"), Line("b", "one two", "three four"))
    assert got.rouge1 == got.rougeL == 0.5


def test_rouge_l_depends_on_the_order():
    got = quality(Line("a", "one two three", "three two one"))
    assert got.rouge1 == 1 and got.rougeL == pytest.approx(1 / 3)


def test_chance_is_the_next_sentences_typed_answer():
    """one two ~ one three: a half; one three ~ four five and four five ~ one two: nothing."""
    got = quality(*(Line(text, text, text) for text in ("one two", "one three", "four five")))
    assert got.rougeL == 1 and got.rougeL_chance == pytest.approx((0.5 + 0 + 0) / 3)


def test_word_errors_are_those_of_the_repeated_sentence():
    got = quality(
        Line("what color is the sky", "blue", "red", "what color is the ski"),
        Line("hello", "hi", "hi", "hello"),
    )
    assert got.wer == pytest.approx(1 / 6) and 0 < got.cer < got.wer


def test_an_empty_answer_has_all_words_wrong():
    assert quality(Line("what color", "blue", "", "")).wer == 1


def test_an_instruction_is_for_the_answers_not_for_the_repeats():
    line = Line("hi", "good day", "good day", "hi")
    assistant = ScriptedAssistant([line])
    evaluate(assistant, [line], "Be brief.", quiet=True)
    assert assistant.instructions == [
        ("typed", "Be brief."),
        ("spoken", "Be brief."),
        ("spoken", REPEAT),
    ]


def test_every_row_holds_its_texts():
    line = Line("hi", "good day", "good night", "high")
    assert quality(line).rows == (
        {"text": "hi", "typed": "good day", "spoken": "good night", "repeated": "high"},
    )


# --- on the bundle ---


def test_speech_that_is_the_typed_embeddings_is_answered_like_typed_text(
    assistant, recordings, monkeypatch
):
    utterances = load_dataset(recordings)
    texts = iter([u.text for u in utterances])

    def typed_embeddings(features):
        return assistant.llm.embed(assistant.llm.encode(next(texts)))

    monkeypatch.setattr(assistant, "soft_tokens", typed_embeddings)
    got = evaluate(assistant, utterances, quiet=True)
    assert all(row["typed"] == row["spoken"] for row in got.rows)
    # ROUGE of a text without a word is 0
    has_words = [bool(re.search("[a-z0-9]", row["typed"].lower())) for row in got.rows]
    assert got.rougeL == got.rouge1 == pytest.approx(sum(has_words) / len(has_words))


def test_final_dots_in_the_transcripts_change_no_error_rate(assistant, recordings):
    utterances = load_dataset(recordings)
    dotted = [replace(u, text=u.text + ".") for u in utterances]
    quality = evaluate(assistant, utterances, quiet=True)
    with_dots = evaluate(assistant, dotted, quiet=True)
    assert (with_dots.wer, with_dots.cer) == (quality.wer, quality.cer)


@pytest.fixture
def with_unusable(recordings, tmp_path):
    """The recordings, and five more to test: silent, cut off, too short, foreign and unreadable."""
    folder = Path(shutil.copytree(recordings, tmp_path / "recordings"))
    good = (folder / "test-100.flac").read_bytes()
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "short.wav", np.full(800, 0.1), 16_000)
    (folder / "cut.flac").write_bytes(good[: len(good) // 2])
    (folder / "none.wav").write_bytes(b"no audio")
    texts = dict.fromkeys(("silent.wav", "short.wav", "cut.flac", "none.wav"), "hello")
    texts["test-100.flac"] = "漢字"
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        for name, text in texts.items():
            row = {"file_name": name, "transcription": text, "split": "test"}
            file.write(json.dumps(row) + "\n")
    return folder


def test_unusable_recordings_are_left_out_and_named(run_cli, bundle_path, with_unusable, caplog):
    options = ("--bundle", bundle_path, "--data", with_unusable, "--threads", 1, "--json")
    done = run_cli("eval", *options)
    assert done.status == 0, done.stderr
    data = done.document["data"]
    assert (done.document["n"], data["test"], data["left_out"]) == (1, 1, 5)
    assert data["other_splits"] == {"train": 2}
    reasons = {entry["reason"]: entry for entry in data["reasons"]}
    assert {entry["count"] for entry in reasons.values()} == {1} and len(reasons) == 5
    assert reasons["nothing was heard"]["example"].startswith("silent.wav: nothing was heard")
    assert "data: 0 train, 0 validation, 1 test used; left out 5: " in done.stderr
    assert "left out 5: nothing was heard (1, e.g. silent.wav" in done.stderr
    for name in ("silent.wav", "short.wav", "cut.flac", "none.wav", "'字'"):
        assert name in caplog.text


def test_notes_about_used_recordings_are_counted(run_cli, bundle_path, recordings, tmp_path):
    for path in recordings.iterdir():
        shutil.copy(path, tmp_path / path.name)
    for path in tmp_path.glob("*.flac"):
        audio, rate = soundfile.read(path)
        soundfile.write(path, np.clip(8 * audio, -1, 1), rate)
    options = ("--bundle", bundle_path, "--data", tmp_path, "--split", "all", "--threads", 1)
    done = run_cli("eval", *options, "--json")
    # the first note: clipped more on one side than on the other, a recording has an offset too
    note = done.document["data"]["notes"][0]
    assert (note["note"], note["count"]) == ("clipped", 3) and "at full scale" in note["example"]
    assert "used, though: clipped (3, e.g. " in done.stderr and done.stderr.count("clipped") == 2


def test_no_usable_recording_is_refused_with_the_reasons(
    run_cli, bundle_path, with_unusable, change_rows
):
    def remove_usable(rows):
        del rows[:3]

    change_rows(with_unusable, remove_usable)
    done = run_cli("eval", "--bundle", bundle_path, "--data", with_unusable, "--threads", 1)
    assert (done.status, done.stdout) == (2, "")
    assert "none of the 5 recordings to measure can be used; left out 5: " in done.stderr
    assert "left out 5: nothing was heard (1," in done.stderr


# --- the command ---


@pytest.fixture
def eval_command(run_cli, recordings):
    """`eval` of the shipped bundle, which is the default: eval_command(*arguments) -> Outcome."""
    options = ("--data", recordings, "--threads", 1, "--json")
    return lambda *arguments: run_cli("eval", *options, *arguments)


def test_the_command_measures_the_test_split(eval_command):
    outcome = eval_command()
    assert outcome.status == 0 and len(outcome.stdout.splitlines()) == 1
    got = outcome.document
    assert got.keys() == DATA_KEYS and got["n"] == 1
    assert (got["backend"], got["user"]) == ("onnxruntime", None)
    assert all(0 <= got[name] <= 1 for name in ("rouge1", "rougeL", "rougeL_chance"))
    assert got["wer"] >= 0


@pytest.mark.parametrize("where", [platform_users, lambda bundle: bundle.path / "users"])
def test_a_user_is_found_in_the_platforms_data_folder_and_in_the_bundle(
    eval_command, bundle_copy, make_user, empty_home, where
):
    bundle = Bundle.open(bundle_copy)
    make_user(bundle, where(bundle) / "ana")
    outcome = eval_command("--bundle", bundle_copy, "--user", "ana")
    assert outcome.status == 0 and outcome.document["user"] == "ana"


def test_all_splits_with_their_rows(eval_command, recordings):
    got = eval_command("--split", "all", "--rows").document
    assert got.keys() == DATA_KEYS | {"rows"} and got["n"] == 3
    assert [row["text"] for row in got["rows"]] == [u.text for u in load_dataset(recordings)]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--split", "dev"], ["no utterances in split 'dev'", "test (1), train (2)"]),
        (["--user", "nobody"], ["no user 'nobody'", "tiny-align align"]),
        (["--backend", "abacus"], ["no backend 'abacus'", "onnxruntime"]),
    ],
)
def test_an_unknown_split_user_or_backend_is_refused_with_the_known_ones(
    eval_command, arguments, messages
):
    outcome = eval_command(*arguments)
    assert outcome.status == 2 and not outcome.stdout
    assert all(message in outcome.stderr for message in messages)
