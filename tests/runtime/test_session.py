"""Conversations: speech is read while it is spoken, answers can be broken off, and no turn spoils another."""

import ctypes
import dataclasses
import threading
import time
from datetime import datetime

import numpy as np
import pytest

from tiny_align.benchmarks.standard.processes import resident_bytes
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime import session as session_module
from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.front_ends.base import KINDS
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.windows import cut

DECODING = Decoding(max_tokens=12)


@pytest.fixture
def long_speech(speech):
    """Longer than three windows."""
    return np.tile(speech, 1 + 160_000 // len(speech))[:160_000]


def tokens(events):
    return [event.token for event in events]


def pushed(session, audio, size):
    for start in range(0, len(audio), size):
        session.push(audio[start : start + size])
    return session


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


@pytest.fixture
def talkative(assistant, monkeypatch):
    """The reference LLM as if it knew more turns: what it answers is nonsense then, but it must be the same."""
    monkeypatch.setattr(
        assistant.llm, "prompt", dataclasses.replace(assistant.llm.prompt, next="<eos><user>")
    )
    return assistant


def remembered(assistant, *turns):
    """Tokens answered to the last of `turns`, embeddings each, from a prompt with all of them, read at once."""
    llm, said = assistant.llm, []
    before, after = llm.around()
    following = llm.embed(llm.encode("<eos><user>"))
    rows = [before]
    for words in turns:
        rows += [words, after]
        said = list(llm.generate(np.concatenate(rows), DECODING))
        rows += [llm.embed(said), following]
    return said


@pytest.mark.parametrize("size", [160, 4_001, 51_200, 10**6])
def test_long_speech_in_pieces_is_answered_as_the_whole(assistant, long_speech, size):
    streamed = tokens(pushed(assistant.listen(decoding=DECODING), long_speech, size).finish())
    features = assistant.features(long_speech)
    whole = assistant.llm.assemble(assistant.soft_tokens(features))
    assert streamed == tokens(assistant.stream(long_speech, decoding=DECODING))
    assert streamed == list(assistant.llm.generate(whole, DECODING))  # read in one piece


def test_speech_is_read_while_it_is_spoken(assistant, long_speech):
    session, n_before = assistant.listen(), len(assistant.llm.around()[0])
    session.push(long_speech[:100])
    session.settle()
    assert session.positions == n_before  # the prompt's beginning, at once
    session.push(long_speech[100:])
    session.settle()
    n_soft_tokens = len(assistant.soft_tokens(assistant.features(long_speech)))
    assert n_before + n_soft_tokens // 2 < session.positions < n_before + n_soft_tokens


def test_the_last_window_is_all_that_is_left(assistant, long_speech, monkeypatch):
    session, heard, hear = assistant.listen(), [], assistant.project_window
    monkeypatch.setattr(
        assistant, "project_window", lambda audio: heard.append(len(audio)) or hear(audio)
    )
    session.push(long_speech)
    windows = [
        len(window) for window, _ in cut(long_speech, assistant.windows, assistant.sample_rate)
    ]
    session.settle()
    assert heard == windows[:-1]
    next(session.finish())
    assert heard == windows and len(windows) > 2


def test_an_end_that_was_foreseen_leaves_nothing_to_do(assistant, long_speech, monkeypatch):
    expected, hear = (
        tokens(assistant.stream(long_speech, decoding=DECODING)),
        assistant.project_window,
    )
    session, heard, read = pushed(assistant.listen(decoding=DECODING), long_speech, 8_000), [], []
    session.anticipate()
    session.settle()
    monkeypatch.setattr(
        assistant, "project_window", lambda audio: heard.append(audio) or hear(audio)
    )
    prefill = assistant.llm.prefill
    monkeypatch.setattr(
        assistant.llm, "prefill", lambda rows, cache: read.append(len(rows)) or prefill(rows, cache)
    )
    assert tokens(session.finish()) == expected
    assert heard == [] and set(read) == {1}  # the answer's own tokens


@pytest.mark.parametrize("seed", range(4))
def test_an_end_that_was_none_leaves_no_trace(talkative, speech, long_speech, seed):
    """Pauses wherever they fall, and turns after that remember what was said and no more."""
    rng, spoken = np.random.default_rng(seed), [talkative.soft_tokens(talkative.features(speech))]
    spoken.append(talkative.soft_tokens(talkative.features(long_speech)))
    session = talkative.listen(decoding=DECODING)
    for turn, audio in enumerate((speech, long_speech)):
        for piece in np.split(audio, np.sort(rng.integers(0, len(audio), 12))):
            session.push(piece)
            if rng.random() < 0.6:
                session.anticipate()
            if rng.random() < 0.5:
                session.settle()
        if seed % 2:
            session.anticipate()
        assert tokens(session.finish()) == remembered(talkative, *spoken[: turn + 1])


def test_silence_is_foreseen_as_nothing(assistant, speech):
    session = assistant.listen(decoding=DECODING)
    session.push(np.zeros(30_000, np.float32))
    session.anticipate()
    assert tokens(session.finish()) == [None]
    assert tokens(pushed(session, speech, 5_000).finish()) == tokens(
        assistant.stream(speech, decoding=DECODING)
    )


def test_too_little_is_foreseen_and_refused_where_it_is_the_end(assistant, speech):
    session = pushed(assistant.listen(decoding=DECODING), speech[:1_000], 1_000)
    session.anticipate()
    session.settle()
    assert tokens(pushed(session, speech[1_000:], 4_000).finish()) == tokens(
        assistant.stream(speech, decoding=DECODING)
    )
    session.push(speech[:1_000])
    session.anticipate()
    with pytest.raises(AudioError, match="record longer"):
        list(session.finish())


def test_an_answer_is_broken_off_within_a_token(assistant, speech):
    session = assistant.listen()
    answer = pushed(session, speech, len(speech)).finish()
    next(answer)
    session.cancel()
    assert list(answer) == []
    session.push(speech)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_cancelling_from_another_thread_before_the_first_token_gives_none(assistant, speech):
    session = pushed(assistant.listen(), speech, len(speech))
    answer = session.finish()
    threading.Thread(target=session.cancel).start()
    time.sleep(0.2)
    assert list(answer) == []


def test_speaking_ends_an_answer_that_is_being_given(assistant, speech):
    session = pushed(assistant.listen(), speech, len(speech))
    answer = session.finish()
    next(answer)
    session.push(speech)  # barge-in
    until(lambda: session.positions == len(assistant.llm.around()[0]))
    assert list(answer) == []
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_typed_and_spoken_turns_in_turn(assistant, speech):
    session = assistant.listen()
    assert tokens(session.say("turn on the kitchen light")) == list(
        assistant.answer_text("turn on the kitchen light").tokens
    )
    assert tokens(pushed(session, speech, 1_000).finish()) == tokens(assistant.stream(speech))
    assert tokens(session.say("count from one to four")) == list(
        assistant.answer_text("count from one to four").tokens
    )


def test_turns_are_remembered(talkative, speech, long_speech):
    session, llm = talkative.listen(decoding=DECODING), talkative.llm
    typed = llm.embed(llm.encode_words("turn on the kitchen light"))
    spoken = [talkative.soft_tokens(talkative.features(audio)) for audio in (speech, long_speech)]
    assert tokens(session.say("turn on the kitchen light")) == remembered(talkative, typed)
    assert tokens(pushed(session, speech, 3_000).finish()) == remembered(
        talkative, typed, spoken[0]
    )
    session.push(np.zeros(40_000, np.float32))
    assert tokens(session.finish()) == [None]  # nothing heard, and nothing remembered of it
    session.push(speech)
    session.reset()
    assert tokens(pushed(session, long_speech, 7_000).finish()) == remembered(
        talkative, typed, *spoken
    )


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(talkative):
    text = "turn on the kitchen light"
    session, words = (
        talkative.listen(decoding=DECODING),
        talkative.llm.embed(talkative.llm.encode_words(text)),
    )
    for _ in range(40):
        last = tokens(session.say(text))
        assert session.positions <= session.capacity
    n_kept = len(session._past)
    assert 1 <= n_kept < 39 and last == remembered(talkative, *[words] * n_kept)


def test_a_context_of_fewer_positions_is_kept_to(bundle_path, speech):
    with Assistant.load(bundle_path, threads=1, context=40) as small:
        assert small.listen().capacity == 40
        with pytest.raises(TinyAlignError, match=r"needs \d+ positions, .* has 40"):
            list(small.listen().say(" ".join(["one two three four five six seven"] * 10)))
    with pytest.raises(TinyAlignError, match="context is 100000: expected 1 to 256"):
        Assistant.load(bundle_path, threads=1, context=100_000)


def test_a_turn_that_fails_is_dropped_and_the_next_is_answered(assistant, speech, monkeypatch):
    session = assistant.listen()
    monkeypatch.setattr(
        LanguageModel, "prefill", lambda *_: (_ for _ in ()).throw(TinyAlignError("no room"))
    )
    session.push(speech)
    with pytest.raises(TinyAlignError, match="no room"):
        list(session.finish())
    monkeypatch.undo()
    session.push(speech)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_a_flood_waits_instead_of_growing(assistant, long_speech, monkeypatch):
    session, behind, hear = assistant.listen(), [], assistant.project_window

    def slow(audio):
        behind.append(len(session._turn.hearing))
        time.sleep(0.01)
        return hear(audio[: len(audio) // 8])

    monkeypatch.setattr(assistant, "project_window", slow)
    session.push(np.tile(long_speech, 5))
    assert (
        len(behind) > session_module.MAX_WINDOWS and max(behind) <= session_module.MAX_WINDOWS + 1
    )
    session.reset()


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.1, -np.inf], np.float32), "NaN or infinite"),
        (np.array([0.1, 3e4], np.float32), "divide 16-bit samples"),
    ],
)
def test_samples_out_of_range_are_refused_and_spoil_nothing(assistant, speech, chunk, why):
    session = pushed(assistant.listen(), speech, 9_000)
    with pytest.raises(AudioError, match=why):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_many_conversations_at_once(assistant, speech):
    """Pushed in turn and answered from threads of their own, each as if it were alone."""
    audios = [speech[: len(speech) - 200 * i] for i in range(50)]
    sessions, answers = [assistant.listen(decoding=DECODING) for _ in audios], {}
    for start in range(0, len(speech), 4_000):
        for session, audio in zip(sessions, audios):
            session.push(audio[start : start + 4_000])
    threads = [
        threading.Thread(target=lambda i=i, s=s: answers.update({i: tokens(s.finish())}))
        for i, s in enumerate(sessions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[i] for i in range(len(audios))] == [
        tokens(assistant.stream(a, decoding=DECODING)) for a in audios
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_memory_that_is_free_goes_back_to_the_system():
    blocks = [
        np.ones(12_000) for _ in range(400)
    ]  # 96 KB each: too small to be given back one by one
    kept, full = blocks[-1], resident_bytes()  # the last one, above the others, holds them
    del blocks
    session_module._give_back_memory()
    assert full - resident_bytes() > 20e6, kept.shape


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("n_samples", [1, 100, 160, 399, 400, 1_599])
def test_a_few_samples_are_too_little_for_every_front_end(
    assistant, speech, monkeypatch, kind, n_samples
):
    monkeypatch.setattr(assistant, "_front_end", kind())
    session = assistant.listen()
    session.push(speech[5_000 : 5_000 + n_samples])
    if n_samples % 2:
        session.anticipate()
    with pytest.raises(AudioError, match=r"expected at least 0\.1 s"):
        list(session.finish())


# --- the day of a conversation ---


class Clock:
    """Stands in for datetime in the runtime: it shows the day it is set to."""

    def __init__(self, day):
        self.day = day

    def now(self):
        return self.day


def test_a_conversation_keeps_the_day_on_which_it_began(talkative, monkeypatch):
    """Over midnight too, so that what is in the cache stays true; the next conversation has the next day."""
    clock = Clock(datetime(2031, 1, 31, 23, 59))
    monkeypatch.setattr("tiny_align.runtime.llm.datetime", clock)
    mark, llm = {"DATE-0-goes-HERE": "%B"}, talkative.llm
    before = llm.prompt.before + "it is DATE-0-goes-HERE"
    monkeypatch.setattr(llm, "prompt", dataclasses.replace(llm.prompt, before=before, dates=mark))
    turns = [llm.embed(llm.encode_words(text)) for text in ("what is the time", "call my mother")]
    january, wanted = llm.around()[0], remembered(talkative, *turns)

    session = talkative.listen(decoding=DECODING)
    list(session.say("what is the time"))
    clock.day = datetime(2031, 2, 1, 0, 1)
    assert tokens(session.say("call my mother")) == wanted
    february = llm.around()[0]
    assert len(january) != len(february)
    fresh = talkative.listen(decoding=DECODING)
    list(fresh.say("what is the time"))
    n_said = len(remembered(talkative, turns[0]))
    assert fresh.positions in (
        len(february) + len(turns[0]) + len(llm.around()[1]) + n for n in (n_said - 1, n_said)
    )
