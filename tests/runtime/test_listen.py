"""The commands listen and chat: played recordings, a microphone that fails, typed turns."""

import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tiny_align.align.data.non_speech import non_speech
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.commands.listen import METER_CELLS, Screen, meter
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.listening import microphone as microphone_module
from tiny_align.runtime.listening.endpoint import Endpointer
from tiny_align.runtime.listening.loop import Level, TurnEnded, listen
from tiny_align.runtime.listening.microphone import Notice

RATE = 16_000
QUICK = ("--threads", 1)
RESULT = {
    "turns",
    "ttft_ms",
    "dropped_s",
    "notices",
    "positions",
    "capacity",
    "backend",
    "user",
    "notes",
}
TURN = {"text", "heard", "cancelled", "tokens", "speech_s", "hangover_s", "ttft_ms", "seconds"}


@pytest.fixture
def three(voice_path):
    return [voice_path / f"train-00{n}.flac" for n in range(3)]


# --- listen ---


def test_recordings_are_answered_one_after_another(run_cli, bundle_path, three):
    done = run_cli("listen", "--bundle", bundle_path, *QUICK, "--fast", "--wav", *three)
    assert done.status == 0, done.stderr
    result = done.document
    assert set(result) == RESULT and all(set(turn) == TURN for turn in result["turns"])
    assert len(result["turns"]) == 3
    assert all(turn["heard"] and not turn["cancelled"] for turn in result["turns"])
    assert done.stdout.splitlines()[:-1] == [turn["text"] for turn in result["turns"]]
    assert all(turn["hangover_s"] == pytest.approx(0.8, abs=0.02) for turn in result["turns"])
    assert result["ttft_ms"] == sorted(turn["ttft_ms"] for turn in result["turns"])[1] > 0
    assert 0 < result["positions"] <= result["capacity"] and not result["notices"]
    assert all(f"turn {n}: " in done.stderr for n in (1, 2, 3)) and "first word" in done.stderr


def test_json_prints_only_the_document_and_answers_are_repeatable(run_cli, bundle_path, three):
    call = ("listen", "--bundle", bundle_path, *QUICK, "--fast", "--json", "--wav", *three)
    one, again = run_cli(*call), run_cli(*call)
    assert (one.status, one.stderr, len(one.stdout.splitlines())) == (0, "", 1)
    texts = [[turn["text"] for turn in done.document["turns"]] for done in (one, again)]
    assert texts[0] == texts[1] and all(texts[0])


def test_noise_is_not_answered(run_cli, bundle_path, tmp_path):
    clips = [tmp_path / f"{seed}.wav" for seed in range(20)]
    for seed, clip in enumerate(clips):
        soundfile.write(clip, non_speech(np.random.default_rng(seed), RATE), RATE)
    done = run_cli("listen", "--bundle", bundle_path, *QUICK, "--fast", "--wav", *clips)
    assert done.status == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert not any(turn["heard"] for turn in done.document["turns"])
    assert done.stderr.count("no word was recognised") == len(done.document["turns"])


def test_speech_before_an_answer_leaves_the_next_answer_complete(assistant, three):
    """A user who goes on at once: the first answer may be cut short, the second is complete."""
    first, second = (read_audio(path, RATE) for path in three[:2])
    silence = np.zeros(RATE, np.float32)

    def answers(*audio):
        events = listen(assistant.listen(), InstantSource(audio), Endpointer(RATE))
        return [event for event in events if isinstance(event, TurnEnded)]

    [alone] = answers(second, silence)
    one, two = answers(first, silence, silence[:4_800], second, silence)
    assert alone.tokens and two.recognised and not two.cancelled
    assert one.cancelled or one.tokens > 1
    assert two.speech_s == pytest.approx(alone.speech_s, abs=0.35)  # its pre-roll


class InstantSource(list):
    """Audio that is all there at once, as if time had passed."""

    live = True

    def stop(self):
        pass


class FailingMicrophone:
    """A microphone that lacks a rate, records one utterance, loses some audio and is pulled out."""

    live = True

    def __init__(self, sample_rate, device):
        assert (sample_rate, device) == (RATE, None)

    def __iter__(self):
        yield Notice("the microphone records at 48000 Hz: resampled to 16000 Hz")
        yield from (self.speech[at : at + 512] for at in range(0, len(self.speech), 512))
        yield Notice("0.5 s of audio dropped", 0.5)
        raise AudioError("the microphone is gone")

    def stop(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_microphone_that_fails_is_a_notice_and_the_speech_before_is_answered(
    run_cli, bundle_path, speech, monkeypatch
):
    monkeypatch.setattr(FailingMicrophone, "speech", speech, raising=False)
    monkeypatch.setattr(microphone_module, "Microphone", FailingMicrophone)
    done = run_cli("listen", "--bundle", bundle_path, *QUICK, "--json")
    assert done.status == 0
    [turn] = done.document["turns"]
    assert turn["text"] and done.document["dropped_s"] == 0.5
    beginnings = [notice[:14] for notice in done.document["notices"]]
    assert beginnings == ["the microphone", "0.5 s of audio", "the microphone"]
    assert done.stderr.splitlines()[-1] == "tiny-align: the microphone is gone"


def test_ctrl_c_ends_it_with_the_document(bundle_path, three):
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", "listen"]
    arguments = ["--bundle", bundle_path, "--threads", 1, "--wav", *three * 9]
    with subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in process.stderr:
            if "first word" in line:
                process.send_signal(signal.SIGINT)
                break
        stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and 1 <= len(json.loads(stdout.splitlines()[-1])["turns"]) < 27


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--fast",), "--fast is for recordings"),
        (("--wav", "none.wav"), "none.wav: no such file"),
        (("--device", "no such microphone"), "give recordings|or recordings"),
        (("--threads", 0), "--threads is 0"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence(run_cli, bundle_path, options, sentence):
    done = run_cli("listen", "--bundle", bundle_path, *options)
    assert done.status == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert any(part in done.stderr for part in sentence.split("|"))


# --- the terminal ---


def test_the_meter_is_full_where_it_is_loud():
    bars = [meter(db) for db in (-120, -60, -35, -10, 0)]
    assert [bar.count("█") for bar in bars] == [0, 0, METER_CELLS // 2, METER_CELLS, METER_CELLS]
    assert {len(bar) for bar in bars} == {METER_CELLS}


def test_the_level_is_shown_only_on_a_terminal(monkeypatch):
    turn = TurnEnded(1, "go on", 2, True, True, 1.5, 0.8, 0.1, 0.2)
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        screen = Screen(quiet=False)
        screen.show(Level(-20.0, 1.25))
        screen.show(turn)
        shown = sys.stderr.getvalue()
        assert ("speaking 1.2 s" in shown) == ("█" in shown) == ("\r" in shown) == terminal
        assert "1.5 s of speech; first word 0.90 s after it" in shown
        assert "cancelled, the user spoke again" in shown


# --- chat ---


@pytest.fixture
def typed(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_piped_lines_are_answered_in_turn(run_cli, bundle_path, typed, assistant):
    typed("call my mother\n\n  \nwhat is the time")
    done = run_cli("chat", "--bundle", bundle_path, *QUICK)
    assert done.status == 0 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tiny-align: about ") and "MiB" in done.stderr
    turns = done.document["turns"]
    assert [turn["asked"] for turn in turns] == ["call my mother", "what is the time"]
    assert turns[0]["text"] == assistant.answer_text("call my mother").text
    assert done.stdout.splitlines()[:-1] == [turn["text"] for turn in turns]
    assert set(done.document) == {"turns", "positions", "capacity", "backend", "user"}


def test_a_line_that_cannot_be_answered_does_not_end_the_chat(run_cli, bundle_path, typed):
    typed("∆∆∆\ncall my mother\n")
    done = run_cli("chat", "--bundle", bundle_path, *QUICK, "--json")
    assert done.status == 0 and len(done.stdout.splitlines()) == 1
    failed, answered = done.document["turns"]
    assert "outside the LLM's tokenizer" in failed["error"] and failed["error"] in done.stderr
    assert answered["text"] and answered["tokens"] > 0


def test_empty_input_has_no_turns(run_cli, bundle_path, typed):
    typed("")
    assert run_cli("chat", "--bundle", bundle_path, *QUICK).document["turns"] == []


def test_a_terminal_gets_a_prompt(run_cli, bundle_path, typed, monkeypatch):
    typed("call my mother\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run_cli("chat", "--bundle", bundle_path, *QUICK, "--json").stderr == "> > "


def test_context_limits_the_positions_of_a_conversation(run_cli, bundle_path, typed):
    typed("call my mother\n" * 9)
    result = run_cli("chat", "--bundle", bundle_path, *QUICK, "--context", 96).document
    assert result["capacity"] == 96 >= result["positions"]
    assert len({turn["text"] for turn in result["turns"]}) == 1
    done = run_cli("chat", "--bundle", bundle_path, *QUICK, "--context", 10**6)
    assert done.status == 2 and "--context is 1000000: expected 1 to 256" in done.stderr
