"""The loop of an assistant that listens: audio -> endpointer -> session -> typed events.

There are two threads. The `AudioReader` takes the source's audio and finds the speech in it. The
`Responder`, on the caller's thread, gives the speech to the session and reads its answers. The
queue between them is bounded and holds speech only: while it is full the reader waits, and what a
microphone cannot buffer meanwhile is dropped and reported. Speech during an answer cancels the
answer (barge-in).
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.events import Event, Token
from tiny_align.runtime.listening.endpoint import (
    Endpointer,
    EndpointEvent,
    Speech,
    SpeechBegan,
    SpeechEnded,
    SpeechPaused,
)
from tiny_align.runtime.listening.microphone import Notice
from tiny_align.runtime.session import Session

BLOCK_S = 0.1  # of a recording that is played
PAUSE_S = 1.5  # of silence after each recording: longer than a hangover
MAX_QUEUE = 64  # events between the threads, most of them a frame of speech
LEVEL_S = 0.1  # between two levels
QUIET_DB = -40.0  # speech whose loudest frame is quieter gets a notice
SILENT_DB = -65.0  # a source gets one too if nothing in it is louder
SILENT_S = 10.0  # for so long from its beginning on
POLL_S = 0.1


@dataclass(frozen=True)
class Level:
    """How loud the audio is, several times a second between answers."""

    db: float  # RMS, dBFS
    speaking_s: float | None  # of the turn that is being spoken; None: silence


@dataclass(frozen=True)
class TurnBegan:
    """The user began to speak."""

    turn: int  # from 1 on
    at_s: float  # of the stream


@dataclass(frozen=True)
class Text:
    """One token of an answer; may be empty."""

    turn: int
    text: str


@dataclass(frozen=True)
class TurnEnded:
    """A whole turn. `ttft_s` leaves out the work that was done during the speech."""

    turn: int
    text: str
    tokens: int
    recognised: bool  # False: no word recognised, or the turn was refused
    cancelled: bool  # the user spoke again
    speech_s: float  # pre-roll and post-roll included
    hangover_s: float  # of silence until the end of the speech was noticed
    ttft_s: float | None  # from then until the first token; None: there was none
    seconds: float  # from then until the last token

    @property
    def heard(self) -> bool:
        """The older name of `recognised`."""
        return self.recognised


LoopEvent = Level | TurnBegan | Text | TurnEnded | Notice
# Between the threads; an exception is raised where the answers are read, None is the end.
QueueItem = EndpointEvent | Notice | Exception | None


class AudioSource(Protocol):
    """Where the loop's audio comes from: a `Microphone`, `Recordings`, or a program's own."""

    @property
    def live(self) -> bool:
        """Whether its time passes whether it is read or not; if not, it waits for each answer."""

    def __iter__(self) -> Iterator[np.ndarray | Notice]:
        """Give (S,) float32 chunks at the endpointer's rate, and notices."""

    def stop(self) -> None:
        """End an iteration; from any thread."""


class Recordings:
    """Recordings as a source: in real time, or each as soon as the one before is answered."""

    def __init__(self, recordings: list[np.ndarray], sample_rate: int, live: bool = True):
        """Play recordings one after another.

        Args:
            recordings: (S,) float32 at `sample_rate` each.
            sample_rate: Hz.
            live: in real time.
        """
        self.live = live
        self._sample_rate = sample_rate
        self._recordings = recordings
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[np.ndarray]:
        block_samples = round(BLOCK_S * self._sample_rate)
        pause = np.zeros(round(PAUSE_S * self._sample_rate), np.float32)
        began_s = time.monotonic()
        n_played = 0
        for recording in self._recordings:
            audio = np.concatenate([recording, pause])
            for at in range(0, len(audio), block_samples):
                block = audio[at : at + block_samples]
                n_played += len(block)
                due_s = began_s + n_played / self._sample_rate  # its last sample has been played
                wait_s = max(0.0, due_s - time.monotonic()) if self.live else 0.0
                if self._stopped.wait(wait_s):
                    return
                yield block

    def stop(self) -> None:
        """End an iteration; from any thread."""
        self._stopped.set()


def listen(
    session: Session, source: AudioSource, endpointer: Endpointer
) -> Generator[LoopEvent, None, None]:
    """Answer each turn of speech until the source ends or the caller stops.

    Args:
        session: `Assistant.listen()`, new.
        source: the audio.
        endpointer: new, or reset.

    Raises:
        TinyAlignError: audio that cannot be used. A source that fails is a Notice, and the end.
    """
    reader = AudioReader(session, source, endpointer)
    reader.start()
    try:
        yield from Responder(session, reader).events()
    finally:
        reader.stop()


class AudioReader(threading.Thread):
    """Reads the source and hands its speech on, in a thread of its own.

    Attributes:
        endpointer: the state of the stream.
        live: the source's.
        turn: the number of the turn that began last, from 1 on; 0: none.
        items: what the thread hands on, each with the `time.perf_counter()` at which it was put.
        answered: released once for each turn that has its answer.
    """

    def __init__(self, session: Session, source: AudioSource, endpointer: Endpointer):
        super().__init__(name="audio-reader", daemon=True)
        self._session = session
        self._source = source
        self.endpointer = endpointer
        self.live = source.live
        self.turn = 0
        self.items: queue.Queue[tuple[QueueItem, float]] = queue.Queue(MAX_QUEUE)
        self.answered = threading.Semaphore(0)
        self._stopped = False
        self._silent_s: float | None = 0.0  # from the beginning on; None: there was a sound

    def run(self) -> None:
        try:
            for item in self._source_items():
                if isinstance(item, Notice):
                    self._hand_on([item])
                else:
                    self._hand_on(self.endpointer.push(item))
                    self._report_silence(len(item))
            self._hand_on(self.endpointer.flush())
        except Exception as error:
            self._put(error)  # raised where the answers are read
        self._put(None)

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        self._stopped = True
        self._source.stop()
        self.join()

    def _source_items(self) -> Iterator[np.ndarray | Notice]:
        """The source's items; if it fails, a notice, so that the speech until then is answered."""
        try:
            yield from self._source
        except AudioError as error:
            yield Notice(str(error))

    def _hand_on(self, events: Sequence[EndpointEvent | Notice]) -> None:
        for event in events:
            if isinstance(event, SpeechBegan):
                self.turn += 1
                self._session.cancel()
            self._put(event)
            if isinstance(event, SpeechEnded) and not self.live:
                self._wait(lambda: self.answered.acquire(timeout=POLL_S))

    def _report_silence(self, n_samples: int) -> None:
        """Put a notice, once, if the source has been silent from its beginning on."""
        if self._silent_s is None:
            return
        self._silent_s += n_samples / self.endpointer.sample_rate
        loudest_db = self.endpointer.loudest_db
        if self.turn or loudest_db >= SILENT_DB:
            self._silent_s = None
        elif self._silent_s >= SILENT_S:
            self._silent_s = None
            notice = Notice(
                f"nothing louder than {loudest_db:.0f} dBFS in {SILENT_S:.0f} s, expected speech "
                f"at {QUIET_DB:.0f} or more: check that the microphone is on, unmuted and selected"
            )
            self._put(notice)

    def _put(self, item: QueueItem) -> None:
        """Put an item into the queue; wait while it is full."""
        timed = (item, time.perf_counter())

        def put() -> bool:
            try:
                self.items.put(timed, timeout=POLL_S)
            except queue.Full:
                return False
            return True

        self._wait(put)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Call `done`, which waits up to POLL_S, until it returns True or the thread is stopped."""
        while not (self._stopped or done()):
            pass


class Responder:
    """Answers the speech that an `AudioReader` hands on."""

    def __init__(self, session: Session, reader: AudioReader):
        self._session = session
        self._reader = reader
        self._rate = reader.endpointer.sample_rate
        self._turn = 0
        self._n_samples = 0  # of the turn
        self._refused = False  # the turn is not answered

    def events(self) -> Iterator[LoopEvent]:
        """The events of all turns, until the reader's end, and levels between them."""
        level_due_s = 0.0
        while True:
            if self._reader.live and time.monotonic() >= level_due_s:
                level_due_s = time.monotonic() + LEVEL_S
                endpointer = self._reader.endpointer
                speaking_s = self._n_samples / self._rate if endpointer.speaking else None
                yield Level(endpointer.level_db, speaking_s)
            try:
                item, put_s = self._reader.items.get(timeout=LEVEL_S)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Notice):
                yield item
            elif isinstance(item, SpeechPaused):
                self._session.anticipate()
            elif isinstance(item, SpeechEnded):
                yield from self._answer(item, put_s)
                self._reader.answered.release()
            else:
                yield from self._push(item)

    def _push(self, item: SpeechBegan | Speech) -> Iterator[TurnBegan | Notice]:
        if isinstance(item, SpeechBegan):
            self._turn += 1
            self._n_samples = 0
            self._refused = False
            yield TurnBegan(self._turn, item.at_sample / self._rate)
        self._n_samples += len(item.audio)
        if self._refused:
            return
        try:
            self._session.push(item.audio)
        except TinyAlignError as error:  # for example: there is no room
            self._refused = True
            yield Notice(str(error))

    def _answer(self, ended: SpeechEnded, noticed_s: float) -> Iterator[Text | TurnEnded | Notice]:
        """Answer a turn; `noticed_s` is the `time.perf_counter()` at which its end was noticed."""
        if ended.loudest_db < QUIET_DB:
            yield Notice(
                f"turn {self._turn} is quiet: {ended.loudest_db:.0f} dBFS at its loudest, "
                f"expected at least {QUIET_DB:.0f}; come closer or raise the microphone's level"
            )
        texts = []
        recognised = not self._refused
        ttft_s = None
        try:
            answer: Iterable[Event] = [] if self._refused else self._session.finish()
            for event in answer:
                if ttft_s is None:
                    ttft_s = time.perf_counter() - noticed_s
                recognised = isinstance(event, Token)
                if self._reader.turn > self._turn:
                    self._session.cancel()  # also if speech came before the answer
                if recognised:
                    texts.append(event.text)
                    yield Text(self._turn, event.text)
        except TinyAlignError as error:
            recognised = False
            yield Notice(str(error))
        yield TurnEnded(
            turn=self._turn,
            text="".join(texts).strip(),
            tokens=len(texts),
            recognised=recognised,
            cancelled=self._reader.turn > self._turn,
            speech_s=self._n_samples / self._rate,
            hangover_s=ended.hangover_s,
            ttft_s=ttft_s,
            seconds=time.perf_counter() - noticed_s,
        )
