"""The prompt of a session in the LLM's KV cache: instruction, earlier turns and the present turn.

    | instruction | earlier turns | soft tokens of this turn | an anticipated end, until withdrawn |
    0                             n_settled                  end.start                 cache.length

Only the prefill queue works on what is here; the caller's thread reads `n_positions`, a number.
"""

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tiny_align.runtime.backends.base import Scores
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel
from tiny_align.runtime.stages import Stage


@dataclass
class PrefilledEnd:
    """An anticipated end of the turn, in the cache: the last soft tokens and the prompt's end."""

    start: int  # its first position
    soft_tokens: list[np.ndarray]  # (T, D) each
    scores: Scores | None = None  # after its last position; None: it is not prefilled completely


@dataclass
class PrefilledTurn:
    """What the prefill queue knows of one turn. Only `cancelled` is for other threads too."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    soft_tokens: list[np.ndarray] = field(default_factory=list)  # (T, D) each, in the cache
    end: PrefilledEnd | None = None
    asked: bool = False  # whether the turn's end is in the cache for good
    steps: Iterator[int] | None = None  # of the answer that is decoded
    answer: list[int] = field(default_factory=list)  # its tokens so far


class PromptCache:
    """The KV cache of one session and its history. Every method runs on the prefill queue."""

    def __init__(
        self, llm: LanguageModel, instruction: str | None, decoding: Decoding, stage: Stage
    ) -> None:
        """
        Args:
            instruction: None: the bundle's.
            stage: gives the contexts in which the stages run.
        """
        self._llm = llm
        self._decoding = decoding
        self._stage = stage
        with stage("prompt"):  # its fixed pieces; a date in them is that of the session's start
            self._before, self._after = llm.around(instruction)  # (P, D), (Q, D)
            self._between_turns = llm.following()  # (R, D)
        self._cache = Cache()
        self._n_settled = 0  # positions that no turn takes back
        self.history: list[np.ndarray] = []  # (T, D) each: a turn, from its words to its answer
        self._turn: PrefilledTurn | None = None  # whose rows follow the settled ones

    @property
    def n_positions(self) -> int:
        """Positions in use."""
        return self._cache.length

    def begin(self, turn: PrefilledTurn) -> int:
        """End the turn before, and make the cache ready for the first words of a new one.

        If the rest of the context has no room for two answers, the oldest turns are forgotten until
        instruction and history fill half of it.

        Returns:
            How many soft tokens were prefilled: 0.
        """
        with self._stage("prompt"):
            if self._turn:
                self._end(self._turn)
                release_free_memory()
            rows = self._prompt_so_far()
            n_needed = len(self._after) + 2 * self._decoding.max_tokens
            if self.history and self._llm.capacity - len(rows) < n_needed:
                while self.history and len(rows) > self._llm.capacity // 2:
                    self.history.pop(0)
                    self._n_settled = 0
                    rows = self._prompt_so_far()
            self._llm.rewind(self._cache, min(self._n_settled, len(rows)))
            if self._cache.length < len(rows):
                self._prefill(rows[self._cache.length :])
            self._n_settled = self._cache.length
            self._turn = turn
        return 0

    def extend(self, turn: PrefilledTurn, soft_tokens: np.ndarray) -> int:
        """Prefill the next soft tokens (T, D) of the turn, T > 0.

        Returns:
            How many were prefilled: T, or 0 for a turn that is cancelled.
        """
        self._take_back_end(turn)
        if turn.cancelled.is_set():
            return 0
        self._prefill(soft_tokens)
        turn.soft_tokens.append(soft_tokens)
        return len(soft_tokens)

    def anticipate(
        self, turn: PrefilledTurn, soft_tokens: list[np.ndarray], withdrawn: threading.Event
    ) -> int:
        """Prefill the end of the turn, in case nothing more is pushed.

        Args:
            soft_tokens: the last ones, (T, D) each, T > 0.
            withdrawn: set when more was pushed.
        Returns:
            How many soft tokens were prefilled.
        """
        self._take_back_end(turn)
        if withdrawn.is_set() or turn.cancelled.is_set():
            return 0
        if not turn.soft_tokens and not soft_tokens:
            return 0  # no word was recognised: nothing to answer
        turn.end = PrefilledEnd(self._cache.length, soft_tokens)
        for rows in soft_tokens:
            self._prefill(rows)
        turn.end.scores = self._prefill(self._after)
        return sum(len(rows) for rows in soft_tokens)

    def ask(self, turn: PrefilledTurn, anticipated: bool) -> None:
        """Complete the prompt; `step` then gives the answer.

        Args:
            anticipated: whether the last end that was anticipated is the turn's end.
        """
        if turn.cancelled.is_set():
            return
        if anticipated and turn.end and turn.end.scores:
            scores = turn.end.scores
            turn.soft_tokens += turn.end.soft_tokens
            turn.end = None
        else:
            self._take_back_end(turn)
            scores = self._prefill(self._after)
        turn.asked = True
        turn.steps = self._llm.decode(scores, self._decoding, self._cache)

    def step(self, turn: PrefilledTurn) -> int | None:
        """Decode the next token of the answer; None at its end or if the turn is cancelled."""
        if turn.cancelled.is_set() or turn.steps is None:
            return None
        with self._stage("decode"):
            token = next(turn.steps, None)
        if token is not None:
            turn.answer.append(token)
        return token

    def _end(self, turn: PrefilledTurn) -> None:
        """Append the turn to the history; drop a turn that never reached the LLM."""
        turn.cancelled.set()
        if turn.asked and self._llm.prompt.next:
            answer = self._llm.embed(turn.answer)
            self.history.append(np.concatenate([*turn.soft_tokens, self._after, answer]))
            # all but the answer's last token, which is not prefilled
            self._n_settled = self._cache.length

    def _prompt_so_far(self) -> np.ndarray:
        """(P, D): instruction and history, up to where the next turn's words stand."""
        pieces = [self._before]
        for turn in self.history:
            pieces += [turn, self._between_turns]
        return np.concatenate(pieces)

    def _take_back_end(self, turn: PrefilledTurn) -> None:
        if turn.end:
            self._llm.rewind(self._cache, turn.end.start)
            turn.end = None

    def _prefill(self, rows: np.ndarray) -> Scores:
        """Prefill (T, D) rows, T > 0; the scores after the last one."""
        with self._stage("prefill"):
            return self._llm.prefill(np.ascontiguousarray(rows, np.float32), self._cache)


def release_free_memory() -> None:
    """Return freed memory to the system, so that hours of turns leave no gaps; half a millisecond.

    Does nothing where the C library has no `malloc_trim` (it is glibc's).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(ctypes.c_size_t(0))
