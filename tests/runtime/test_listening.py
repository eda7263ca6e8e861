"""The loop with a session that only echoes: turns in order, barge-in, sources that fail."""

import threading
import time

import numpy as np
import pytest

from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.events import NothingHeard, Token
from tiny_align.runtime.listening.endpoint import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    Endpointer,
    Endpointing,
)
from tiny_align.runtime.listening.loop import (
    BLOCK_S,
    MAX_QUEUE,
    PAUSE_S,
    Level,
    Recordings,
    Text,
    TurnBegan,
    TurnEnded,
    listen,
)
from tiny_align.runtime.listening.microphone import Notice

ALIVE_S = 20.0  # what takes longer is a deadlock
LOUD = 0.1


class Echo:
    """Answers with `n_tokens` tokens, the first of which tells how many samples were pushed.

    No word is recognised if the samples are quiet.
    """

    def __init__(self, n_tokens=3, token_s=0.0):
        self.n_tokens, self.token_s = n_tokens, token_s
        self.spoken, self.turns = [], []
        self.answering = threading.Event()
        self._cancelled = threading.Event()

    def push(self, chunk):
        self.spoken.append(chunk)

    def anticipate(self):
        pass

    def finish(self):
        audio, self.spoken = np.concatenate(self.spoken), []
        self.turns.append(audio)
        self._cancelled.clear()
        if abs(audio).max() < LOUD / 2:
            yield NothingHeard("", 0.0)
            return
        for token in range(self.n_tokens):
            self.answering.set()
            if self._cancelled.wait(self.token_s):
                return
            yield Token(f" {len(audio)}" if token == 0 else " more", 0.0, token)

    def cancel(self):
        self._cancelled.set()


class AnySound:
    """A detector that takes every sound that passes the gate for speech."""

    def __call__(self, frame):
        return 1.0

    def reset(self):
        pass


class Source:
    """Chunks and notices one by one; calls functions and raises exceptions among them."""

    def __init__(self, items, live=False):
        self.items, self.live, self.taken = items, live, 0

    def __iter__(self):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            if callable(item):
                item()
                continue
            self.taken += 1
            yield item

    def stop(self):
        self.stopped = True


def sound(seconds, level=LOUD):
    n = round(seconds * SAMPLE_RATE) // FRAME_SAMPLES * FRAME_SAMPLES
    return (level * np.random.default_rng(0).choice([-1, 1], n)).astype(np.float32)


def silence(seconds):
    return sound(seconds, 0.0)


@pytest.fixture
def endpointer():
    return Endpointer(SAMPLE_RATE, detector=AnySound())


def without_levels(events):
    return [event for event in events if not isinstance(event, Level)]


@pytest.fixture(autouse=True)
def no_thread_remains():
    before = set(threading.enumerate())
    yield
    assert not [t for t in threading.enumerate() if t not in before and t.name == "audio-reader"]


# --- turns ---


def test_turns_are_answered_in_order(endpointer):
    session = Echo()
    recordings = Recordings([sound(1), sound(2), sound(0.5, LOUD / 4)], SAMPLE_RATE, live=False)
    events = without_levels(listen(session, recordings, endpointer))
    kinds = [TurnBegan, Text, Text, Text, TurnEnded]
    assert [type(e) for e in events] == [*kinds, *kinds, TurnBegan, TurnEnded]
    assert [e.turn for e in events] == [1] * 5 + [2] * 5 + [3] * 2
    one, two, three = (e for e in events if isinstance(e, TurnEnded))
    lengths = [len(audio) for audio in session.turns]
    assert (one.text, one.tokens) == (f"{lengths[0]} more more", 3)
    assert one.recognised and not one.cancelled
    assert one.heard and not three.heard  # the older name
    assert (three.recognised, three.text, three.tokens) == (False, "", 0)
    assert [t.speech_s for t in (one, two, three)] == pytest.approx(
        [n / SAMPLE_RATE for n in lengths]
    )
    assert 0 <= one.ttft_s <= one.seconds and one.hangover_s == pytest.approx(0.8, abs=0.02)
    pre_roll = Endpointing().pre_roll_s  # nothing is before the first
    assert lengths[1] - lengths[0] == pytest.approx(
        (1 + pre_roll) * SAMPLE_RATE, abs=2 * FRAME_SAMPLES
    )


def test_silence_gives_one_notice_and_no_turn(endpointer):
    session = Echo()
    [notice] = without_levels(listen(session, Source([silence(1)] * 30), endpointer))
    assert not session.spoken and not session.turns
    assert notice.text.startswith(
        "nothing louder than -120 dBFS in 10 s, expected speech at -40 or more: check that"
    )


def test_a_source_with_a_sound_gets_no_notice_of_silence(endpointer):
    source = Source([sound(0.05), *[silence(1)] * 30])
    assert not without_levels(listen(Echo(), source, endpointer))


@pytest.mark.parametrize(("level", "quiet"), [(LOUD, False), (0.004, True)])
def test_a_quiet_turn_gets_a_notice_with_its_level(endpointer, level, quiet):
    events = without_levels(listen(Echo(), Source([sound(2, level), silence(2)]), endpointer))
    assert len([e for e in events if isinstance(e, TurnEnded)]) == 1
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert [text.startswith("turn 1 is quiet: -48 dBFS") for text in notices] == [True] * quiet


def test_chunks_of_any_size_give_the_same_answers(endpointer):
    audio = np.concatenate(
        [silence(0.5), sound(1), silence(1.2), sound(1.5), silence(0.3), sound(0.4)]
    )
    rng = np.random.default_rng(1)
    answers = []
    for n_cuts in (0, 10, 3000):
        session = Echo()
        cuts = np.sort(rng.integers(0, len(audio), n_cuts))
        endpointer.reset()
        events = without_levels(listen(session, Source(np.split(audio, cuts)), endpointer))
        answers.append([e.text for e in events if isinstance(e, TurnEnded)])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 2


def test_live_recordings_take_their_time_and_give_levels(endpointer):
    began = time.monotonic()
    source = Recordings([sound(0.5)], SAMPLE_RATE)
    events = list(listen(Echo(), source, endpointer))
    assert time.monotonic() - began > 0.4 + PAUSE_S
    levels = [e for e in events if isinstance(e, Level)]
    assert len(levels) >= 8 and max(level.db for level in levels) == pytest.approx(-20, abs=0.1)
    assert any(level.speaking_s for level in levels) and levels[0].speaking_s is None


# --- barge-in ---


def test_speech_during_an_answer_cancels_it_within_a_token(endpointer):
    session = Echo(n_tokens=10**6, token_s=0.01)
    second_turn = [
        lambda: session.answering.wait(ALIVE_S),
        sound(0.5),
        lambda: setattr(session, "n_tokens", 2),
    ]
    source = Source([sound(1), silence(1), *second_turn, silence(1)], live=True)
    events = without_levels(listen(session, source, endpointer))
    one, two = (e for e in events if isinstance(e, TurnEnded))
    assert one.cancelled and 0 <= one.tokens < 100 and not two.cancelled and two.tokens == 2
    assert len(session.turns) == 2 and len(session.turns[1]) < len(session.turns[0])


def test_speech_before_an_answer_has_begun_cancels_it_too(endpointer):
    session = Echo(n_tokens=10**6)
    both_spoken = threading.Event()
    waited = []
    push = session.push

    def push_late(chunk):  # the second turn has begun before the first is answered
        if not waited:
            waited.append(both_spoken.wait(ALIVE_S))
        push(chunk)

    session.push = push_late
    speech = np.concatenate([sound(0.4), silence(1), sound(0.3)])
    source = Source([speech, lambda: setattr(session, "n_tokens", 1)], live=True)
    threading.Timer(0.3, both_spoken.set).start()
    events = without_levels(listen(session, source, endpointer))
    one, two = (e for e in events if isinstance(e, TurnEnded))
    assert waited == [True] and one.cancelled and one.tokens <= 1 and not two.cancelled


# --- events that are not read, a source or a session that fails ---


def test_the_source_waits_while_no_events_are_read(endpointer):
    source = Source([sound(0.1)] * 2000, live=True)
    events = listen(Echo(), source, endpointer)
    while not isinstance(next(events), TurnBegan):
        pass
    n_waiting = taken_when_settled(source)
    assert n_waiting * 3 <= MAX_QUEUE + 20  # three frames a chunk
    assert taken_when_settled(source) == n_waiting
    last = [e for e in without_levels(events) if isinstance(e, TurnEnded)][-1]
    assert source.taken == 2000 and last.speech_s == pytest.approx(
        2000 * 3 * FRAME_SAMPLES / SAMPLE_RATE, abs=0.5
    )


def taken_when_settled(source) -> int:
    """How much was taken once no more is."""
    before = None
    while before != source.taken:
        before = source.taken
        time.sleep(0.3)
    return before


@pytest.mark.parametrize("n_read", [0, 1, 2, 4])
def test_closing_the_events_ends_the_thread(endpointer, n_read):
    events = listen(Echo(), Source([sound(1), silence(1)] * 50), endpointer)
    for _ in range(n_read):
        next(events)
    events.close()


def test_a_source_that_fails_gives_a_notice_and_its_last_turn_is_answered(endpointer):
    session = Echo()
    source = Source([sound(1), AudioError("the microphone is gone")])
    *turn, ended = without_levels(listen(session, source, endpointer))
    assert isinstance(ended, TurnEnded) and ended.tokens == 3
    assert Notice("the microphone is gone") in turn


def test_notices_of_the_source_are_passed_on(endpointer):
    notice = Notice("1.0 s of audio dropped", 1.0)
    source = Source([silence(1), notice, silence(1)])
    assert without_levels(listen(Echo(), source, endpointer)) == [notice]


def test_other_errors_are_raised_where_the_answers_are_read(endpointer):
    for fault in (ZeroDivisionError(), np.array([np.nan], np.float32)):
        with pytest.raises((ZeroDivisionError, AudioError)):
            list(listen(Echo(), Source([sound(1), fault]), endpointer))


@pytest.mark.parametrize("method", ["push", "finish"])
def test_a_refused_turn_gives_a_notice_and_the_next_turn_is_answered(endpointer, method):
    session, refusals = Echo(), [TinyAlignError("there is no room")]
    work = getattr(session, method)

    def once(*args):
        if refusals:
            raise refusals.pop()
        return work(*args)

    setattr(session, method, once)
    source = Source([sound(1), silence(1), sound(1), silence(1)])
    events = without_levels(listen(session, source, endpointer))
    assert [e for e in events if isinstance(e, Notice)] == [Notice("there is no room")]
    one, two = (e for e in events if isinstance(e, TurnEnded))
    assert (one.recognised, one.tokens, one.ttft_s) == (False, 0, None) and two.tokens == 3
    assert len(session.turns) == 1


def test_a_recording_is_played_in_blocks():
    blocks = list(Recordings([sound(1)], SAMPLE_RATE, live=False))
    assert {len(b) for b in blocks[:-1]} == {round(BLOCK_S * SAMPLE_RATE)}
    assert np.array_equal(np.concatenate(blocks)[: len(sound(1))], sound(1))
