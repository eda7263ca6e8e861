"""One answer, stage by stage, by timers that observe the runtime (`Assistant.observe`).

A stage's seconds are its own, without those of the stages inside it, on the harness's clock. What
is in no stage is the answer's unexplained share. Everything runs in one thread, one stage after
another: what a session's two threads add or save is for the caller to measure.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from tiny_align.benchmarks.standard.harness import Side, now
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.stages import STAGES

__all__ = ["ANSWER", "FIRST", "PER_TOKEN", "STAGES", "Timers", "answering", "timing", "unexplained"]

FIRST = "to first token"
PER_TOKEN = "per token"
ANSWER = "answer"


class Timers:
    """Seconds of each stage's own since they were made."""

    def __init__(self, slow: dict[str, float]) -> None:
        """slow: stage -> how many times as long it takes, to see it reported."""
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.slow = slow
        self.inner: list[float] = []  # of each open stage, the seconds of the stages inside it

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context in which the stage runs once, on one thread for all of them."""
        return _Timer(self, name)


class _Timer(AbstractContextManager[None]):
    """Times one run of a stage."""

    def __init__(self, timers: Timers, name: str) -> None:
        self._timers = timers
        self._name = name

    def __enter__(self) -> None:
        self._timers.inner.append(0.0)
        self._began = now()

    def __exit__(self, *_: object) -> None:
        timers = self._timers
        own = now() - self._began - timers.inner.pop()
        factor = timers.slow.get(self._name, 1.0)
        timers.seconds[self._name] += own + waste(own * (factor - 1.0))
        if timers.inner:
            timers.inner[-1] += now() - self._began


def waste(seconds: float) -> float:
    """Be busy for so long, and say for how long it was."""
    began = now()
    while (spent := now() - began) < seconds:
        pass
    return spent


@contextmanager
def timing(assistant: Assistant, slow: dict[str, float] | None = None) -> Iterator[Timers]:
    """Timers of the assistant's stages, which run one after another in this thread.

    Args:
        slow: stage -> how many times as long it takes, to see it reported.
    """
    timers = Timers(slow or {})
    with assistant.observe(timers, one_thread=True):
        yield timers


def answering(
    assistant: Assistant, audio: np.ndarray, slow: dict[str, float] | None = None
) -> Side:
    """A side that answers the recording (S,): its stages, and what a user notices."""

    def side() -> dict[str, float]:
        with timing(assistant, slow) as timers:
            began = now()
            marks = [now() for _ in assistant.stream(audio)]
            whole = now() - began
        per_token = (marks[-1] - marks[0]) / max(1, len(marks) - 1)
        return timers.seconds | {FIRST: marks[0] - began, PER_TOKEN: per_token, ANSWER: whole}

    return side


def unexplained(seconds: dict[str, float]) -> float:
    """The share of an answer that no stage took; `seconds` are medians or one turn's."""
    return 1 - sum(seconds[stage] for stage in STAGES) / seconds[ANSWER]
