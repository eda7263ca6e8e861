"""A conversation: the LLM reads speech while it is spoken, answers when it ends, and remembers the turns before.

Speech that is pushed is cut into windows (windows.py). A window that is whole goes through encoder and projector on
one thread, and the soft tokens that are certain then go into the LLM's cache on another, while the next window is being
heard: when the person stops, the last window is all that is left. The two threads are the assistant's; all its
conversations take turns on them, as they come, so that a model never runs twice at once and no lock is held.

What is in the cache is decided by the audio alone, not by the size of its pieces or the pace at which they come.
"""

import contextlib
import copy
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from tiny_align.runtime.audio.samples import check_chunk
from tiny_align.runtime.backends.base import Scores
from tiny_align.runtime.errors import AudioError, TinyAlignError
from tiny_align.runtime.llm import Cache, Decoding, TextStream
from tiny_align.runtime.windows import Cutter

MAX_WINDOWS = 8  # waiting to be heard; a push that would make them more waits


@dataclass(frozen=True)
class Event:
    """A piece of an answer or, as the only one, that nothing was heard."""

    text: str  # what this token adds to the answer; may be empty
    token: int | None  # None: no word was heard, so there is no answer
    elapsed_s: float  # since the speech (or the text) was complete


class Threads:
    """On which an assistant hears and reads: one each, started when they are needed."""

    def __init__(self):
        self._encode_queue = ThreadPoolExecutor(1, "tiny-align-hearing")
        self._prefill_queue = ThreadPoolExecutor(1, "tiny-align-reading")

    def encode(self, work: Callable, *args) -> Future:
        return _submitted(self._encode_queue, work, *args)

    def prefill(self, work: Callable, *args) -> Future:
        return _submitted(self._prefill_queue, work, *args)

    def close(self) -> None:
        """End both, after what they are doing now."""
        self._encode_queue.shutdown(cancel_futures=True)
        self._prefill_queue.shutdown(cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, work: Callable, *args) -> Future:
    try:
        return pool.submit(work, *args)
    except RuntimeError as error:
        if "shutdown" not in str(error):  # "can't start new thread"
            raise
        raise TinyAlignError("the assistant is closed: load the bundle again") from error


@dataclass
class End:
    """A turn's end as it would be if nothing more were said."""

    words: list[np.ndarray] = field(default_factory=list)  # (T, D) each: the last ones
    scores: Scores | None = None  # after the prompt's end; None: not read
    heard: Future | None = None  # whose result is the Future of reading it
    error: AudioError | None = None  # why there is nothing to be heard, if this is the end


@dataclass
class Turn:
    """One turn, as far as it has come."""

    cutter: Cutter
    began_s: float = 0.0  # perf_counter when the speech (or the text) was complete
    reader: object = None  # of the projector's output, once there is some
    hearing: deque[Future] = field(default_factory=deque)  # windows on their way
    reading: deque[Future] = field(default_factory=deque)  # what the LLM is to read
    words: list[np.ndarray] = field(
        default_factory=list
    )  # (T, D) each: what the LLM has read of the person
    end: End | None = None  # anticipated, until more is pushed
    end_at: int | None = (
        None  # position of the cache where an anticipated end begins, if there is one in it
    )
    asked: bool = False  # whether the LLM has read that the words end here
    said: list[int] = field(default_factory=list)  # tokens of the answer
    cancelled: threading.Event = field(default_factory=threading.Event)


class Session:
    """One conversation with its KV cache.

    A turn is speech (`push` any number of chunks, then `finish`) or text (`say`). A turn that begins ends the answer
    that is being given. Where the cache has no room for another turn, the oldest are forgotten, until instruction and
    turns fill half of it. An LLM that knows one turn only (no `prompt.next` in the manifest) begins each turn after the
    instruction.
    """

    def __init__(self, assistant, instruction: str | None = None, decoding: Decoding = Decoding()):
        self._assistant, self._llm, self._decoding = assistant, assistant.llm, decoding
        self._before, self._after = self._llm.around(instruction)  # (P, D), (Q, D)
        self._following = (
            self._llm.following()
        )  # (R, D); like these of the day on which the conversation began
        self._turn: Turn | None = None  # that is being spoken
        self._asked: Turn | None = None  # that is being answered
        # the reading thread's own:
        self._cache, self._settled = Cache(), 0  # positions of it that no turn takes back
        self._past: list[
            np.ndarray
        ] = []  # (T, D) each: the turns that are remembered, from the words to the answer
        self._latest: Turn | None = None  # whose rows are in the cache behind the settled ones

    @property
    def capacity(self) -> int:
        """Positions of the cache, fixed when the assistant is loaded."""
        return self._llm.capacity

    @property
    def positions(self) -> int:
        """Positions in use."""
        return self._cache.length

    def push(self, chunk: np.ndarray) -> None:
        """Add (S,) float32 samples in [-1, 1] at the assistant's rate to the turn; any number of samples.

        Waits while MAX_WINDOWS windows are behind.

        Raises:
            AudioError: not such samples; the turn is as it was.
            TinyAlignError: what was pushed earlier could not be heard or read; the turn is dropped.
        """
        check_chunk(chunk)
        turn = self._turn = self._turn or self._begun()
        turn.end = None if len(chunk) else turn.end
        with self._dropped_if_failed(turn):
            for window, kept in turn.cutter.push(chunk):
                self._hear(turn, window, kept)
                _settle(turn.hearing, MAX_WINDOWS)

    def finish(self, began_s: float | None = None) -> Iterator[Event]:
        """The turn is spoken: its answer, an event for each token, or one event that nothing was heard.

        Args:
            began_s: the time.perf_counter() that events count from, if not this moment.
        Raises:
            AudioError: nothing was pushed, or too little.
            TinyAlignError: it could not be heard or read; the turn is dropped.
        """
        turn, self._turn = self._turn or self._begun(), None
        self._asked, turn.began_s = turn, began_s or time.perf_counter()
        if turn.cutter.n_samples and not turn.end:
            for window, kept in turn.cutter.finish():
                self._hear(turn, window, kept)
        return self._answer_speech(turn)

    def say(self, text: str) -> Iterator[Event]:
        """A typed turn: its answer, an event for each token. Speech of an unfinished turn is forgotten.

        Raises:
            DataError: no words, or characters that the LLM does not know.
        """
        words = self._llm.embed(self._llm.encode_words(text))
        self.reset()
        turn = self._asked = self._begun()
        turn.began_s = time.perf_counter()
        turn.reading.append(self._later(self._read, turn, words))
        return self._answer(turn)

    def anticipate(self) -> None:
        """Hear and read in a pause what was pushed as if the turn ended here: then `finish` has nothing left to do.

        More that is pushed undoes it; the answer is the same with it and without.
        """
        if (turn := self._turn) and turn.cutter.n_samples:
            turn.end = End()
            turn.end.heard = self._assistant.threads.encode(
                self._heard_to_end, turn, turn.end, turn.cutter.finish()
            )

    def settle(self) -> None:
        """Wait until what was pushed is heard and read, as far as it can be before the turn's end.

        Raises:
            TinyAlignError: it could not be; the turn is dropped.
        """
        if turn := self._turn:
            with self._dropped_if_failed(turn):
                _settle(turn.hearing)
                if turn.end:
                    turn.end.heard.result().result()
                _settle(turn.reading)

    def reset(self) -> None:
        """Forget the speech of the present turn."""
        if self._turn:
            self._turn.cancelled.set()
            self._turn = None

    def cancel(self) -> None:
        """End the answer that is being given, within one token; from any thread. What was said of it is remembered."""
        if turn := self._asked:
            turn.cancelled.set()

    # --- the caller's thread ---

    def _begun(self) -> Turn:
        """A turn, the beginning of whose prompt is read at once."""
        turn = Turn(Cutter(self._assistant.windows, self._assistant.sample_rate))
        turn.reading.append(self._later(self._begin, turn))
        return turn

    def _hear(self, turn: Turn, window: np.ndarray, kept: slice) -> None:
        turn.hearing.append(self._assistant.threads.encode(self._heard, turn, window, kept))

    def _later(self, work: Callable, *args) -> Future:
        return self._assistant.threads.prefill(work, *args)

    def _answer_speech(self, turn: Turn) -> Iterator[Event]:
        with self._dropped_if_failed(turn):
            if not turn.cutter.n_samples:
                raise AudioError(
                    "the speech is empty, it holds no samples: push some before finish()"
                )
            _settle(turn.hearing)
            if turn.end:
                turn.reading.append(turn.end.heard.result())
                if turn.end.error:
                    raise turn.end.error
            elif turn.reader and len(rest := turn.reader.finish()):
                turn.reading.append(self._later(self._read, turn, rest))
            _settle(turn.reading)
        if turn.words or (turn.end and turn.end.words) or turn.cancelled.is_set():
            yield from self._answer(turn)
        else:
            yield Event("", None, time.perf_counter() - turn.began_s)

    def _answer(self, turn: Turn) -> Iterator[Event]:
        with self._dropped_if_failed(turn):
            _settle(turn.reading)
            steps, pieces = self._later(self._ask, turn).result(), TextStream(self._llm.tokenizer)
            while (token := self._later(self._step, turn, steps).result()) is not None:
                yield Event(pieces.push(token), token, time.perf_counter() - turn.began_s)

    @contextlib.contextmanager
    def _dropped_if_failed(self, turn: Turn):
        try:
            yield
        except Exception:
            turn.cancelled.set()
            self._turn = None if self._turn is turn else self._turn
            raise

    # --- the hearing thread ---

    def _heard(self, turn: Turn, window: np.ndarray, kept: slice) -> None:
        """A window's soft tokens, as far as they are certain, are to be read."""
        if turn.cancelled.is_set():
            return
        turn.reader = turn.reader or self._assistant.reader()
        if len(soft_tokens := turn.reader.push(self._assistant.project_window(window)[kept])):
            turn.reading.append(self._later(self._read, turn, soft_tokens))

    def _heard_to_end(self, turn: Turn, end: End, windows: list) -> Future:
        """The last soft tokens, if this is the end: by a copy of the turn's reader."""
        if turn.end is end and not turn.cancelled.is_set():
            reader = copy.copy(turn.reader) or self._assistant.reader()
            try:
                pieces = [
                    reader.push(self._assistant.project_window(window)[kept])
                    for window, kept in windows
                ]
                end.words = [
                    soft_tokens for soft_tokens in [*pieces, reader.finish()] if len(soft_tokens)
                ]
            except AudioError as error:  # too little, so far
                end.error = error
        return self._later(self._read_to_end, turn, end)

    # --- the reading thread ---

    def _begin(self, turn: Turn) -> None:
        """The cache holds what is remembered, and is ready for a turn's words."""
        if self._latest:
            self._end(self._latest)
            _give_back_memory()
        rows = self._remembered()
        if (
            self._past
            and self.capacity - len(rows) < len(self._after) + 2 * self._decoding.max_tokens
        ):
            while self._past and len(rows) > self.capacity // 2:
                self._past.pop(0)
                rows, self._settled = self._remembered(), 0
        self._llm.rewind(self._cache, min(self._settled, len(rows)))
        self._extend(rows[self._cache.length :])
        self._settled, self._latest = self._cache.length, turn

    def _remembered(self) -> np.ndarray:
        """(P, D): the instruction and the turns so far, up to where the next words stand."""
        return np.concatenate(
            [self._before, *(np.concatenate([rows, self._following]) for rows in self._past)]
        )

    def _read(self, turn: Turn, words: np.ndarray) -> None:
        self._take_back_end(turn)
        if not turn.cancelled.is_set():
            self._extend(words)
            turn.words.append(words)

    def _read_to_end(self, turn: Turn, end: End) -> None:
        self._take_back_end(turn)
        if turn.end is not end or turn.cancelled.is_set() or not (turn.words or end.words):
            return
        turn.end_at = self._cache.length
        for words in end.words:
            self._extend(words)
        end.scores = self._extend(self._after)

    def _take_back_end(self, turn: Turn) -> None:
        if turn.end_at is not None:
            self._llm.rewind(self._cache, turn.end_at)
            turn.end_at = None

    def _ask(self, turn: Turn) -> Iterator[int]:
        """The words end here -> what gives the answer's tokens."""
        if turn.cancelled.is_set():
            return iter(())
        if turn.end and turn.end.scores:
            scores, turn.words = turn.end.scores, [*turn.words, *turn.end.words]
        else:
            scores = self._extend(self._after)
        turn.asked = True
        return self._llm.decode(scores, self._decoding, self._cache)

    def _step(self, turn: Turn, steps: Iterator[int]) -> int | None:
        token = None if turn.cancelled.is_set() else next(steps, None)
        if token is not None:
            turn.said.append(token)
        return token

    def _end(self, turn: Turn) -> None:
        """A turn that was asked is remembered with what was said; another has never been."""
        turn.cancelled.set()
        if turn.asked and self._llm.prompt.next:
            self._past.append(
                np.concatenate([*turn.words, self._after, self._llm.embed(turn.said)])
            )
            self._settled = (
                self._cache.length
            )  # but for the last token that was said, which nobody has read

    def _extend(self, rows: np.ndarray) -> Scores | None:
        """Read (T, D) rows; the scores after the last one."""
        return (
            self._llm.prefill(np.ascontiguousarray(rows, np.float32), self._cache)
            if len(rows)
            else None
        )


def _give_back_memory() -> None:
    """What a turn has used and freed goes back to the system, so that hours of turns leave no gaps; half a millisecond.

    Where the C library knows how (glibc).
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


def _settle(futures: deque[Future], left: int = 0) -> None:
    """Wait until at most `left` are not done; raises what they raised."""
    while len(futures) > left or (futures and futures[0].done()):
        futures.popleft().result()
