"""Sessions: speech is prefilled while it is pushed, answers can be cancelled, turns stay apart."""

import ctypes
import dataclasses
import threading
import time
from datetime import datetime

import numpy as np
import pytest

from tiny_align.benchmarks.standard.processes import resident_bytes
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.front_ends.base import KINDS
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.prompt_cache import release_free_memory
from tiny_align.runtime.session import MAX_WINDOWS
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
def multi_turn(assistant, monkeypatch):
    """The reference LLM as if it knew more than one turn: nonsense, but always the same."""
    prompt = dataclasses.replace(assistant.llm.prompt, next="<eos><user>")
    monkeypatch.setattr(assistant.llm, "prompt", prompt)
    return assistant


def answer_at_once(assistant, *turns):
    """The answer's tokens to the last of `turns`, (T, D) each, from one prompt with all of them."""
    llm = assistant.llm
    answer = []
    before, after = llm.around()
    following = llm.embed(llm.encode("<eos><user>"))
    rows = [before]
    for words in turns:
        rows += [words, after]
        answer = list(llm.generate(np.concatenate(rows), DECODING))
        rows += [llm.embed(answer), following]
    return answer


def watch_windows(assistant, monkeypatch):
    """The lengths of the windows that are encoded from now on, a list that grows."""
    project_window = assistant.project_window
    lengths = []

    def watched(audio, projector):
        lengths.append(len(audio))
        return project_window(audio, projector)

    monkeypatch.setattr(assistant, "project_window", watched)
    return lengths


@pytest.mark.parametrize("size", [160, 4_001, 51_200, 10**6])
def test_long_speech_in_chunks_is_answered_as_the_whole(assistant, long_speech, size):
    streamed = tokens(pushed(assistant.listen(decoding=DECODING), long_speech, size).finish())
    features = assistant.features(long_speech)
    whole = assistant.llm.assemble(assistant.soft_tokens(features))
    assert streamed == tokens(assistant.stream(long_speech, decoding=DECODING))
    assert streamed == list(assistant.llm.generate(whole, DECODING))  # prefilled at once


def test_speech_is_prefilled_while_it_is_pushed(assistant, long_speech):
    session = assistant.listen()
    n_before = len(assistant.llm.around()[0])
    session.push(long_speech[:100])
    session.settle()
    assert session.positions == n_before  # the prompt's beginning, at once
    session.push(long_speech[100:])
    session.settle()
    n_soft_tokens = len(assistant.soft_tokens(assistant.features(long_speech)))
    assert n_before + n_soft_tokens // 2 < session.positions < n_before + n_soft_tokens


def test_finish_encodes_only_the_last_window(assistant, long_speech, monkeypatch):
    windows = cut(long_speech, assistant.windows, assistant.sample_rate)
    lengths = [len(audio) for audio, _ in windows]
    encoded = watch_windows(assistant, monkeypatch)
    session = assistant.listen()
    session.push(long_speech)
    session.settle()
    assert encoded == lengths[:-1]
    next(session.finish())
    assert encoded == lengths and len(lengths) > 2


def test_finish_after_anticipate_encodes_nothing_and_prefills_only_the_answer(
    assistant, long_speech, monkeypatch
):
    expected = tokens(assistant.stream(long_speech, decoding=DECODING))
    session = pushed(assistant.listen(decoding=DECODING), long_speech, 8_000)
    session.anticipate()
    session.settle()
    encoded = watch_windows(assistant, monkeypatch)
    prefill = assistant.llm.prefill
    n_rows = []
    monkeypatch.setattr(
        assistant.llm,
        "prefill",
        lambda rows, cache: n_rows.append(len(rows)) or prefill(rows, cache),
    )
    assert tokens(session.finish()) == expected
    assert encoded == [] and set(n_rows) == {1}  # the answer's own tokens


@pytest.mark.parametrize("seed", range(4))
def test_anticipate_then_more_speech_equals_no_anticipate(multi_turn, speech, long_speech, seed):
    """Wherever the ends are anticipated, and in the next turn too."""
    rng = np.random.default_rng(seed)
    spoken = [multi_turn.soft_tokens(multi_turn.features(a)) for a in (speech, long_speech)]
    session = multi_turn.listen(decoding=DECODING)
    for turn, audio in enumerate((speech, long_speech)):
        for piece in np.split(audio, np.sort(rng.integers(0, len(audio), 12))):
            session.push(piece)
            if rng.random() < 0.6:
                session.anticipate()
            if rng.random() < 0.5:
                session.settle()
        if seed % 2:
            session.anticipate()
        assert tokens(session.finish()) == answer_at_once(multi_turn, *spoken[: turn + 1])


class FirstWindowOnly:
    """Reads three soft tokens from a turn's first window and none from the rest."""

    def __init__(self, llm):
        self.rows = llm.embed([5, 6, 7])

    def push(self, vectors):
        rows, self.rows = self.rows, self.rows[:0]
        return rows

    def finish(self):
        return self.rows[:0]


def test_a_withdrawn_end_leaves_the_prompt_if_no_word_follows(assistant, long_speech, monkeypatch):
    monkeypatch.setattr(assistant, "reader", lambda _: FirstWindowOnly(assistant.llm))
    answers = []
    for anticipated in (False, True):
        session = pushed(assistant.listen(decoding=DECODING), long_speech, 8_000)
        session.settle()
        n_before = session.positions
        if anticipated:
            session.anticipate()
            session.settle()
            assert session.positions > n_before
        session.push(long_speech[:1_000])
        answers.append((tokens(session.finish()), session.positions))
    assert answers[0] == answers[1]


def test_an_anticipated_end_of_silence_is_no_word_recognised(assistant, speech):
    session = assistant.listen(decoding=DECODING)
    session.push(np.zeros(30_000, np.float32))
    session.anticipate()
    assert tokens(session.finish()) == [None]
    expected = tokens(assistant.stream(speech, decoding=DECODING))
    assert tokens(pushed(session, speech, 5_000).finish()) == expected


def test_too_little_speech_is_refused_only_if_the_anticipated_end_is_the_end(assistant, speech):
    session = pushed(assistant.listen(decoding=DECODING), speech[:1_000], 1_000)
    session.anticipate()
    session.settle()
    expected = tokens(assistant.stream(speech, decoding=DECODING))
    assert tokens(pushed(session, speech[1_000:], 4_000).finish()) == expected
    session.push(speech[:1_000])
    session.anticipate()
    with pytest.raises(AudioError, match="record longer"):
        list(session.finish())


def test_cancel_ends_the_answer_within_a_token(assistant, speech):
    session = assistant.listen()
    answer = pushed(session, speech, len(speech)).finish()
    next(answer)
    session.cancel()
    assert list(answer) == []
    session.push(speech)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_cancel_before_the_first_token_gives_no_token(assistant, speech):
    session = pushed(assistant.listen(), speech, len(speech))
    answer = session.finish()
    threading.Thread(target=session.cancel).start()
    time.sleep(0.2)
    assert list(answer) == []


def test_push_during_an_answer_ends_it(assistant, speech):
    session = pushed(assistant.listen(), speech, len(speech))
    answer = session.finish()
    next(answer)
    session.push(speech)  # barge-in
    until(lambda: session.positions == len(assistant.llm.around()[0]))
    assert list(answer) == []
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_typed_and_spoken_turns_mix(assistant, speech):
    session = assistant.listen()
    first = assistant.answer_text("turn on the kitchen light")
    assert tokens(session.say("turn on the kitchen light")) == list(first.tokens)
    assert tokens(pushed(session, speech, 1_000).finish()) == tokens(assistant.stream(speech))
    last = assistant.answer_text("count from one to four")
    assert tokens(session.say("count from one to four")) == list(last.tokens)


def test_an_answer_depends_on_all_earlier_turns(multi_turn, speech, long_speech):
    session = multi_turn.listen(decoding=DECODING)
    llm = multi_turn.llm
    typed = llm.embed(llm.encode_words("turn on the kitchen light"))
    spoken = [multi_turn.soft_tokens(multi_turn.features(audio)) for audio in (speech, long_speech)]
    assert tokens(session.say("turn on the kitchen light")) == answer_at_once(multi_turn, typed)
    expected = answer_at_once(multi_turn, typed, spoken[0])
    assert tokens(pushed(session, speech, 3_000).finish()) == expected
    session.push(np.zeros(40_000, np.float32))
    assert tokens(session.finish()) == [None]  # a turn without a word is not remembered
    session.push(speech)
    session.reset()
    expected = answer_at_once(multi_turn, typed, *spoken)
    assert tokens(pushed(session, long_speech, 7_000).finish()) == expected


def test_a_full_context_forgets_the_oldest_turns(multi_turn):
    text = "turn on the kitchen light"
    words = multi_turn.llm.embed(multi_turn.llm.encode_words(text))
    session = multi_turn.listen(decoding=DECODING)
    for _ in range(40):
        last = tokens(session.say(text))
        assert session.positions <= session.capacity
    n_turns = len(session._prompt.history)
    assert 1 <= n_turns < 39 and last == answer_at_once(multi_turn, *[words] * n_turns)


def test_a_context_of_fewer_positions_is_the_limit(bundle_path, speech):
    with Assistant.load(bundle_path, threads=1, context=40) as small:
        assert small.listen().capacity == 40
        with pytest.raises(TinyAlignError, match=r"needs \d+ positions, .* has 40"):
            list(small.listen().say(" ".join(["one two three four five six seven"] * 10)))
    with pytest.raises(TinyAlignError, match="context is 100000: expected 1 to 256"):
        Assistant.load(bundle_path, threads=1, context=100_000)


def test_a_turn_that_fails_is_dropped_and_the_next_is_answered(assistant, speech, monkeypatch):
    def fail(*_):
        raise TinyAlignError("no room")

    session = assistant.listen()
    monkeypatch.setattr(LanguageModel, "prefill", fail)
    session.push(speech)
    with pytest.raises(TinyAlignError, match="no room"):
        list(session.finish())
    monkeypatch.undo()
    session.push(speech)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_push_waits_while_too_many_windows_are_queued(assistant, long_speech, monkeypatch):
    session = assistant.listen()
    project_window = assistant.project_window
    n_queued = []

    def slow(audio, projector):
        n_queued.append(len(session._turn.encodings))
        time.sleep(0.01)
        return project_window(audio[: len(audio) // 8], projector)

    monkeypatch.setattr(assistant, "project_window", slow)
    session.push(np.tile(long_speech, 5))
    assert len(n_queued) > MAX_WINDOWS and max(n_queued) <= MAX_WINDOWS + 1
    session.reset()


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.1, -np.inf], np.float32), "NaN or infinite"),
        (np.array([0.1, 3e4], np.float32), "divide 16-bit samples"),
    ],
)
def test_samples_out_of_range_are_refused_and_change_nothing(assistant, speech, chunk, why):
    session = pushed(assistant.listen(), speech, 9_000)
    with pytest.raises(AudioError, match=why):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(assistant.stream(speech))


def test_fifty_sessions_at_once_answer_as_each_alone(assistant, speech):
    """Pushed in turn, and answered from threads of their own."""
    audios = [speech[: len(speech) - 200 * i] for i in range(50)]
    sessions = [assistant.listen(decoding=DECODING) for _ in audios]
    answers = {}
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
    for i, audio in enumerate(audios):
        assert answers[i] == tokens(assistant.stream(audio, decoding=DECODING)), i


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_release_free_memory_returns_it_to_the_system():
    # 96 KB each: too small to be returned one by one
    blocks = [np.ones(12_000) for _ in range(400)]
    last = blocks[-1]  # lies above the others, and keeps their memory
    full = resident_bytes()
    del blocks
    release_free_memory()
    assert full - resident_bytes() > 20e6, last.shape


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("n_samples", [1, 100, 160, 399, 400, 1_599])
def test_a_few_samples_are_refused_with_every_front_end(
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
    """Stands in for datetime in the runtime, set to a day."""

    def __init__(self, day):
        self.day = day

    def now(self):
        return self.day


def test_a_session_keeps_the_day_on_which_it_began(multi_turn, monkeypatch):
    """Past midnight too, so that the cache stays valid; the next session has the next day."""
    clock = Clock(datetime(2031, 1, 31, 23, 59))
    monkeypatch.setattr("tiny_align.runtime.llm.datetime", clock)
    mark = {"DATE-0-goes-HERE": "%B"}
    llm = multi_turn.llm
    before = llm.prompt.before + "it is DATE-0-goes-HERE"
    monkeypatch.setattr(llm, "prompt", dataclasses.replace(llm.prompt, before=before, dates=mark))
    turns = [llm.embed(llm.encode_words(text)) for text in ("what is the time", "call my mother")]
    january = llm.around()[0]
    expected = answer_at_once(multi_turn, *turns)

    session = multi_turn.listen(decoding=DECODING)
    list(session.say("what is the time"))
    clock.day = datetime(2031, 2, 1, 0, 1)
    assert tokens(session.say("call my mother")) == expected
    february = llm.around()[0]
    assert len(january) != len(february)
    fresh = multi_turn.listen(decoding=DECODING)
    list(fresh.say("what is the time"))
    n_answer = len(answer_at_once(multi_turn, turns[0]))
    n_prompt = len(february) + len(turns[0]) + len(llm.around()[1])
    assert fresh.positions - n_prompt in (n_answer - 1, n_answer)
