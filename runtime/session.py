"""A session: speech is encoded and prefilled while it is spoken, then answered and remembered.

Speech that is pushed is cut into windows (windows.py). A complete window goes through encoder and
projector on the encode queue; the soft tokens that are certain then go into the LLM's KV cache on
the prefill queue, while the next window is spoken. When the user stops, only the last window is
left.

Three threads work on a session. Each has state of its own:

- the caller's thread: `Turn`, the audio that is not encoded yet and the work that is queued;
- the encode queue: `SpeechEncoder`, the readout of one turn's speech;
- the prefill queue: `PromptCache` (prompt_cache.py), the KV cache and the history.

Between them pass futures, arrays that no thread changes, and two threading.Events: `cancelled` of a
turn and `withdrawn` of an anticipated end. All sessions of an assistant share its queues.

What is in the cache is decided by the audio alone, not by the size of its chunks or their pace.
"""

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tiny_align.runtime.audio.samples import check_chunk
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.events import NothingHeard, Token
from tiny_align.runtime.llm import Decoding, LanguageModel, TextStream
from tiny_align.runtime.projectors import LoadedProjector
from tiny_align.runtime.prompt_cache import PrefilledTurn, PromptCache
from tiny_align.runtime.queues import Queues
from tiny_align.runtime.readout import Reader
from tiny_align.runtime.stages import Stage
from tiny_align.runtime.windows import Cutter, Window, WindowSpec

MAX_WINDOWS = 8  # on the encode queue, of one session; a push that would make them more waits


class SpeechStack(Protocol):
    """What a session needs of its assistant."""

    llm: LanguageModel
    queues: Queues
    windows: WindowSpec | None
    sample_rate: int

    @property
    def stage(self) -> Stage: ...

    def reader(self, projector: LoadedProjector | None) -> Reader: ...

    def project_window(
        self, audio: np.ndarray, projector: LoadedProjector | None
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class EncodedEnd:
    """What the encode queue made of an anticipated end."""

    prefilled: Future[int]  # how many soft tokens of it
    error: AudioError | None  # why it cannot be the end


class SpeechEncoder:
    """One turn's speech, from windows to soft tokens. Every method runs on the encode queue."""

    def __init__(
        self,
        stack: SpeechStack,
        projector: LoadedProjector | None,
        prefill: Callable[..., Future[int]],
        prompt: PromptCache,
        turn: PrefilledTurn,
    ) -> None:
        """
        Args:
            projector: the user's; None: the default.
            prefill: queues work for the prefill queue.
        """
        self._stack = stack
        self._projector = projector
        self._prefill = prefill
        self._prompt = prompt
        self._turn = turn
        self._reader: Reader | None = None  # from the first window on

    def encode(self, windows: list[Window], last: bool = False) -> list[Future[int]]:
        """Encode windows, and queue the soft tokens that are certain to be prefilled.

        Args:
            last: whether the turn ends after them.
        Returns:
            Futures of how many soft tokens were prefilled.
        Raises:
            AudioError: too little audio.
        """
        prefills: list[Future[int]] = []
        if self._turn.cancelled.is_set():
            return prefills
        with self._stack.stage("readout"):
            if self._reader is None:
                self._reader = self._stack.reader(self._projector)
            for window in windows:
                soft_tokens = self._read(self._reader, window)
                if len(soft_tokens):
                    prefills.append(self._prefill(self._prompt.extend, self._turn, soft_tokens))
            if last:
                soft_tokens = self._reader.finish()
                if len(soft_tokens):
                    prefills.append(self._prefill(self._prompt.extend, self._turn, soft_tokens))
        return prefills

    def anticipate(self, windows: list[Window], withdrawn: threading.Event) -> EncodedEnd:
        """Encode the last windows as if the turn ended after them, and queue the end's prefill.

        A copy of the reader does it: the turn may go on.

        Args:
            withdrawn: set when more was pushed.
        """
        soft_tokens: list[np.ndarray] = []
        error = None
        if not withdrawn.is_set() and not self._turn.cancelled.is_set():
            try:
                soft_tokens = self._read_to_end(windows)
            except AudioError as too_little:
                error = too_little
        work = self._prompt.anticipate
        return EncodedEnd(self._prefill(work, self._turn, soft_tokens, withdrawn), error)

    def _read_to_end(self, windows: list[Window]) -> list[np.ndarray]:
        """(T, D) each, T > 0: the last soft tokens, by a copy of the reader."""
        with self._stack.stage("readout"):
            reader = copy.copy(self._reader) or self._stack.reader(self._projector)
            pieces = [self._read(reader, window) for window in windows]
            pieces.append(reader.finish())
            return [piece for piece in pieces if len(piece)]

    def _read(self, reader: Reader, window: Window) -> np.ndarray:
        """(T, D): the soft tokens that are certain after this window."""
        audio, keep = window
        vectors = self._stack.project_window(audio, self._projector)
        return reader.push(vectors[keep])


@dataclass(frozen=True)
class AnticipatedEnd:
    """The turn's end if nothing more is pushed."""

    withdrawn: threading.Event
    encoded: Future[EncodedEnd]


@dataclass
class Turn:
    """One turn as the caller's thread sees it."""

    cutter: Cutter
    encoder: SpeechEncoder  # for the encode queue
    prefilled: PrefilledTurn  # for the prefill queue
    cancelled: threading.Event
    began_s: float = 0.0  # perf_counter when the speech (or the text) was complete
    encodings: deque[Future[list[Future[int]]]] = field(default_factory=deque)
    prefills: deque[Future[int]] = field(default_factory=deque)
    n_soft_tokens: int = 0  # in the cache, as far as `prefills` have been waited for
    end: AnticipatedEnd | None = None

    def withdraw_end(self) -> None:
        """Undo `anticipate`."""
        if self.end:
            self.end.withdrawn.set()
            self.end = None

    def wait_for_encodings(self, n_left: int = 0) -> None:
        """Wait until at most `n_left` are not done; raises what they raised."""
        while len(self.encodings) > n_left or (self.encodings and self.encodings[0].done()):
            self.prefills += self.encodings.popleft().result()

    def wait_for_prefills(self) -> None:
        """Wait until all are done; raises what they raised."""
        while self.prefills:
            self.n_soft_tokens += self.prefills.popleft().result()


class Session:
    """One conversation with its KV cache.

    A turn is speech (`push` any number of chunks, then `finish`) or text (`say`). A new turn ends
    the answer to the one before. Where the cache has no room for another turn, the oldest are
    forgotten, until instruction and turns fill half of it. An LLM that knows one turn only (no
    `prompt.next` in the manifest) begins each turn after the instruction.
    """

    def __init__(
        self,
        stack: SpeechStack,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        projector: LoadedProjector | None = None,
    ) -> None:
        """
        Args:
            instruction: what to do with the speech; None: the bundle's.
            projector: the user's; None: the assistant's default, also where that is swapped.
        """
        self._stack = stack
        self._llm = stack.llm
        self._projector = projector
        self._queues = stack.queues
        self._prompt = PromptCache(stack.llm, instruction, decoding, stack.stage)
        self._turn: Turn | None = None  # that is being spoken
        self._answered: Turn | None = None  # that is being answered

    @property
    def capacity(self) -> int:
        """Positions of the cache, fixed when the assistant is loaded."""
        return self._llm.capacity

    @property
    def positions(self) -> int:
        """Positions in use."""
        return self._prompt.n_positions

    def push(self, chunk: np.ndarray) -> None:
        """Add (S,) float32 samples in [-1, 1] at the assistant's rate to the turn, S >= 0.

        Waits while MAX_WINDOWS windows are on the encode queue.

        Raises:
            AudioError: not such samples; the turn is as it was.
            TinyAlignError: what was pushed earlier could not be encoded or prefilled; the turn is
                dropped.
        """
        with self._stack.stage("front end"):
            check_chunk(chunk)
            if self._turn is None:
                self._turn = self._begin_turn()
            turn = self._turn
            if len(chunk):
                turn.withdraw_end()
            with self._dropped_if_failed(turn):
                for window in turn.cutter.push(chunk):
                    self._encode(turn, [window])
                    turn.wait_for_encodings(MAX_WINDOWS)

    def finish(self, began_s: float | None = None) -> Iterator[Token | NothingHeard]:
        """End the spoken turn and answer it: a Token each, or one NothingHeard.

        Args:
            began_s: the time.perf_counter() that events count from, if not this moment.
        Raises:
            AudioError: nothing was pushed, or too little.
            TinyAlignError: it could not be encoded or prefilled; the turn is dropped.
        """
        with self._stack.stage("front end"):
            turn = self._turn or self._begin_turn()
            self._turn = None
            self._answered = turn
            turn.began_s = began_s or time.perf_counter()
            if turn.cutter.n_samples and not turn.end:
                self._encode(turn, turn.cutter.finish(), last=True)
        return self._answer_speech(turn)

    def say(self, text: str) -> Iterator[Token]:
        """Answer a typed turn: a Token each. Speech of an unfinished turn is forgotten.

        Raises:
            DataError: no words, or characters that the LLM does not know.
        """
        words = self._llm.embed(self._llm.encode_words(text))
        self.reset()
        turn = self._begin_turn()
        self._answered = turn
        turn.began_s = time.perf_counter()
        work = self._prompt.extend
        turn.prefills.append(self._queues.prefill(work, turn.prefilled, words))
        return self._answer(turn)

    def anticipate(self) -> None:
        """Encode and prefill in a pause what was pushed, as if the turn ended here.

        Then `finish` has nothing left to do. Pushing more undoes it. The answer is the same as
        without it.
        """
        turn = self._turn
        if turn is None or not turn.cutter.n_samples:
            return
        turn.withdraw_end()
        withdrawn = threading.Event()
        work = turn.encoder.anticipate
        encoded = self._queues.encode(work, turn.cutter.finish(), withdrawn)
        turn.end = AnticipatedEnd(withdrawn, encoded)

    def settle(self) -> None:
        """Wait until what was pushed is encoded and prefilled, as far as the turn's end allows.

        Raises:
            TinyAlignError: it could not be; the turn is dropped.
        """
        turn = self._turn
        if turn is None:
            return
        with self._dropped_if_failed(turn):
            turn.wait_for_encodings()
            if turn.end:
                turn.end.encoded.result().prefilled.result()
            turn.wait_for_prefills()

    def reset(self) -> None:
        """Forget the speech of the present turn."""
        if self._turn:
            self._turn.cancelled.set()
            self._turn = None

    def cancel(self) -> None:
        """End the present answer within one token; from any thread.

        The tokens so far are remembered.
        """
        turn = self._answered
        if turn:
            turn.cancelled.set()

    def _begin_turn(self) -> Turn:
        """A new turn; the beginning of its prompt is prefilled at once."""
        prefill = self._queues.prefill
        prefilled = PrefilledTurn()
        turn = Turn(
            cutter=Cutter(self._stack.windows, self._stack.sample_rate),
            encoder=SpeechEncoder(self._stack, self._projector, prefill, self._prompt, prefilled),
            prefilled=prefilled,
            cancelled=prefilled.cancelled,
        )
        turn.prefills.append(prefill(self._prompt.begin, prefilled))
        return turn

    def _encode(self, turn: Turn, windows: list[Window], last: bool = False) -> None:
        turn.encodings.append(self._queues.encode(turn.encoder.encode, windows, last))

    def _answer_speech(self, turn: Turn) -> Iterator[Token | NothingHeard]:
        with self._dropped_if_failed(turn):
            if not turn.cutter.n_samples:
                raise AudioError(
                    "the speech is empty, it holds no samples: push some before finish()"
                )
            turn.wait_for_encodings()
            if turn.end:
                end = turn.end.encoded.result()
                if end.error:
                    raise end.error
                turn.prefills.append(end.prefilled)
            turn.wait_for_prefills()
        if turn.n_soft_tokens or turn.cancelled.is_set():
            yield from self._answer(turn)
        else:
            yield NothingHeard("", time.perf_counter() - turn.began_s)

    def _answer(self, turn: Turn) -> Iterator[Token]:
        prefill = self._queues.prefill
        text = TextStream(self._llm.tokenizer)
        with self._dropped_if_failed(turn):
            turn.wait_for_prefills()
            anticipated = turn.end is not None
            prefill(self._prompt.ask, turn.prefilled, anticipated).result()
            while True:
                token = prefill(self._prompt.step, turn.prefilled).result()
                if token is None:
                    break
                with self._stack.stage("text"):
                    piece = text.push(token)
                yield Token(piece, time.perf_counter() - turn.began_s, token)

    @contextlib.contextmanager
    def _dropped_if_failed(self, turn: Turn) -> Iterator[None]:
        """Drop the turn if its work fails in any way; the error itself goes on to the caller."""
        try:
            yield
        except Exception:  # raised again
            turn.cancelled.set()
            if self._turn is turn:
                self._turn = None
            raise
