"""The loop of an assistant that listens: audio -> endpointer -> session -> typed events.

Two threads. One hears: it takes the source's audio and finds the speech in it. The caller's answers: it gives the
speech to the session and reads its answers. The queue between them is bounded and holds speech only; where it is
full the first waits, and what a microphone cannot keep meanwhile is dropped and said. Speech during an answer cancels
it (barge-in).
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.listening.endpoint import (
    Endpointer,
    Speech,
    SpeechBegan,
    SpeechEnded,
    SpeechPaused,
)
from tiny_align.runtime.listening.microphone import Notice

BLOCK_S = 0.1  # of a recording that is played
PAUSE_S = 1.5  # of silence after each recording: longer than a hangover
WAITING = 64  # events between the threads, a frame of speech each
LEVEL_S = 0.1  # between two levels
QUIET_DB = -40.0  # speech whose loudest moment is quieter gets a notice
DEAF_DB, DEAF_S = -65.0, 10.0  # and so does a source in which nothing has been louder for so long
POLL_S = 0.1


@dataclass(frozen=True)
class Level:
    """How loud it is, a few times a second while nobody is answered."""

    db: float  # RMS, dBFS
    speaking_s: float | None  # of the turn that is being spoken; None: silence


@dataclass(frozen=True)
class TurnBegan:
    """A person began to speak."""

    turn: int  # from 1 on
    at_s: float  # of the stream


@dataclass(frozen=True)
class Text:
    """A piece of an answer; may be empty."""

    turn: int
    text: str


@dataclass(frozen=True)
class TurnEnded:
    """A whole turn. Work before the end was noticed is not in `ttft_s`: it was done while the person spoke."""

    turn: int
    text: str
    tokens: int
    heard: bool  # False: no word in it, or refused
    cancelled: bool  # the person spoke again
    speech_s: float  # pre-roll and post-roll included
    hangover_s: float  # silence until the end was noticed
    ttft_s: float | None  # then, until the first token; None: there was none
    seconds: float  # then, until the last one


Event = Level | TurnBegan | Text | TurnEnded | Notice


class Recordings:
    """Recordings as a source of audio: played as time passes, or each as soon as the one before is answered."""

    def __init__(self, recordings: list[np.ndarray], sample_rate: int, live: bool = True):
        """
        Args:
            recordings: (S,) float32 at `sample_rate` each.
            live: in real time.
        """
        self.live, self._sample_rate, self._recordings = live, sample_rate, recordings
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[np.ndarray]:
        began, played = time.monotonic(), 0
        for block in self._blocks():
            played += len(block)
            due = began + played / self._sample_rate  # a block is there when its last sample is
            if self._stopped.wait(max(0.0, due - time.monotonic()) if self.live else 0.0):
                return
            yield block

    def _blocks(self) -> Iterator[np.ndarray]:
        size, pause = (
            round(BLOCK_S * self._sample_rate),
            np.zeros(round(PAUSE_S * self._sample_rate), np.float32),
        )
        for recording in self._recordings:
            audio = np.concatenate([recording, pause])
            yield from (audio[at : at + size] for at in range(0, len(audio), size))

    def stop(self) -> None:
        """End an iteration; from any thread."""
        self._stopped.set()


def listen(session, source, endpointer: Endpointer) -> Iterator[Event]:
    """Answer what is said, turn by turn, until the source ends or the caller stops.

    Args:
        session: `Assistant.listen()`, new.
        source: an iterable of (S,) float32 chunks at the endpointer's rate and of Notices, with `stop()` for any
            thread; `live` if its time passes whether it is read or not. One that is not live waits for each answer.
        endpointer: new, or reset.
    Raises:
        TinyAlignError: audio that cannot be used. A source that fails is a Notice, and the end.
    """
    ears = _Ears(session, source, endpointer)
    ears.start()
    try:
        yield from _Mouth(session, ears).events()
    finally:
        ears.stop()


class _Ears(threading.Thread):
    """Hears the source and hands on its speech."""

    def __init__(self, session, source, endpointer: Endpointer):
        super().__init__(name="listening", daemon=True)
        self._session, self._source, self.endpointer = session, source, endpointer
        self.live, self.turn = source.live, 0  # the turn that was begun last
        self.heard: queue.Queue = queue.Queue(
            WAITING
        )  # (event, when), (exception, when), or (None, when) at the end
        self.answered = threading.Semaphore(0)
        self._stopped = False
        self._listened_s: float | None = 0.0  # until something is loud enough to be speech

    def run(self) -> None:
        try:
            for item in self._items():
                events = [item] if isinstance(item, Notice) else self.endpointer.push(item)
                self._hand_on(events)
                self._notice_deafness(item)
            self._hand_on(self.endpointer.flush())
        except Exception as error:
            self._put(error)  # raised where the answers are read
        self._put(None)

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        self._stopped = True
        self._source.stop()
        self.join()

    def _items(self) -> Iterator[np.ndarray | Notice]:
        try:
            yield from self._source
        except AudioError as error:  # what was said until then is answered
            yield Notice(str(error))

    def _notice_deafness(self, item: np.ndarray | Notice) -> None:
        """Say once that a source has been silent from its beginning on."""
        if self._listened_s is None or isinstance(item, Notice):
            return
        self._listened_s += len(item) / self.endpointer.sample_rate
        loudest = self.endpointer.loudest_db
        if self.turn or loudest >= DEAF_DB:
            self._listened_s = None
        elif self._listened_s >= DEAF_S:
            self._listened_s = None
            heard = f"nothing louder than {loudest:.0f} dBFS in {DEAF_S:.0f} s, expected speech at {QUIET_DB:.0f}"
            self._put(
                Notice(f"{heard} or more: check that the microphone is on, unmuted and selected")
            )

    def _hand_on(self, events: list) -> None:
        for event in events:
            if isinstance(event, SpeechBegan):
                self.turn += 1
                self._session.cancel()
            self._put(event)
            if isinstance(event, SpeechEnded) and not self.live:
                self._wait(lambda: self.answered.acquire(timeout=POLL_S))

    def _put(self, item) -> None:
        timed = (item, time.perf_counter())
        self._wait(lambda: _put(self.heard, timed))

    def _wait(self, done) -> None:
        while not (self._stopped or done()):
            pass


def _put(to: queue.Queue, item) -> bool:
    try:
        to.put(item, timeout=POLL_S)
    except queue.Full:
        return False
    return True


class _Mouth:
    """Answers what the ears hand on."""

    def __init__(self, session, ears: _Ears):
        self._session, self._ears = session, ears
        self._rate = ears.endpointer.sample_rate
        self._turn, self._samples, self._refused = 0, 0, False

    def events(self) -> Iterator[Event]:
        for item, when in self._heard():
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Level | Notice):
                yield item
            elif isinstance(item, SpeechPaused):
                self._session.anticipate()
            elif isinstance(item, SpeechEnded):
                yield from self._answer(item, when)
                self._ears.answered.release()
            else:
                yield from self._push(item)

    def _heard(self) -> Iterator[tuple]:
        """What the ears hand on, until their end, with levels between."""
        due = 0.0
        while True:
            if self._ears.live and time.monotonic() >= due:
                due = time.monotonic() + LEVEL_S
                yield self._level(), None
            try:
                item, when = self._ears.heard.get(timeout=LEVEL_S)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item, when

    def _level(self) -> Level:
        speaking = self._ears.endpointer.speaking
        return Level(
            self._ears.endpointer.level_db, self._samples / self._rate if speaking else None
        )

    def _push(self, item: SpeechBegan | Speech) -> Iterator[TurnBegan | Notice]:
        if isinstance(item, SpeechBegan):
            self._turn, self._samples, self._refused = self._turn + 1, 0, False
            yield TurnBegan(self._turn, item.at_sample / self._rate)
        self._samples += len(item.audio)
        if self._refused:
            return
        try:
            self._session.push(item.audio)
        except TinyAlignError as error:  # there is no room, for one: the turn is not answered
            self._refused = True
            yield Notice(str(error))

    def _answer(self, ended: SpeechEnded, noticed: float) -> Iterator[Text | TurnEnded | Notice]:
        texts, tokens, heard, first = [], 0, not self._refused, None
        if ended.loudest_db < QUIET_DB:
            yield Notice(
                f"turn {self._turn} is quiet: {ended.loudest_db:.0f} dBFS at its loudest, expected at least "
                f"{QUIET_DB:.0f}; come closer or raise the microphone's level"
            )
        try:
            for event in [] if self._refused else self._session.finish():
                first = first or time.perf_counter()
                heard = event.token is not None
                if self._ears.turn > self._turn:
                    self._session.cancel()  # also where speech came before the answer
                if heard:
                    texts, tokens = [*texts, event.text], tokens + 1
                    yield Text(self._turn, event.text)
        except TinyAlignError as error:
            heard = False
            yield Notice(str(error))
        yield TurnEnded(
            self._turn,
            "".join(texts).strip(),
            tokens,
            heard,
            self._ears.turn > self._turn,
            self._samples / self._rate,
            ended.hangover_s,
            first and first - noticed,
            time.perf_counter() - noticed,
        )
