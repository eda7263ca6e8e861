"""One answer, stage by stage: timers put around the runtime's own calls, so that what is timed is what runs.

A stage's seconds are its own, without those of the stages that it calls, on the harness's clock. What no timer is
around is the answer's unexplained share. Everything runs in one thread, one stage after another: what a session's two
threads add or save is for the caller to measure. The runtime knows nothing of it; a name that it no longer has fails.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np

from tiny_align.benchmarks.standard.harness import Side, now
from tiny_align.runtime import assistant as assistant_module
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.llm import TextStream
from tiny_align.runtime.readout import CtcReader, PooledReader
from tiny_align.runtime.session import Session

FIRST, PER_TOKEN, ANSWER = "to first token", "per token", "answer"
STAGES = ("front end", "encoder", "projector", "readout", "prompt", "prefill", "decode", "text")


class InTurn:
    """Instead of a session's threads: everything at once, so that stages do not overlap."""

    def encode(self, work: Callable, *args) -> Future:
        done = Future()
        done.set_result(work(*args))
        return done

    prefill = encode


def points(assistant: Assistant) -> list[tuple[object, str, str]]:
    """Owner, attribute and stage of every call that is timed."""
    return [
        (assistant_module, "check_audio", "front end"),
        (Session, "push", "front end"),  # the checks and the cutting
        (Session, "finish", "front end"),
        (assistant, "project_window", "front end"),  # all of it but the graphs
        (assistant._encoder, "_run", "encoder"),
        (assistant._projector, "_run", "projector"),
        (Session, "_heard", "readout"),  # which makes the reader
        (CtcReader, "push", "readout"),
        (CtcReader, "finish", "readout"),
        (PooledReader, "push", "readout"),
        (assistant.llm, "around", "prompt"),
        (Session, "_begin", "prompt"),
        (Session, "_read", "prefill"),
        (Session, "_ask", "prefill"),
        (Session, "_extend", "prefill"),
        (Session, "_step", "decode"),
        (TextStream, "push", "text"),
    ]


class Timers:
    """Seconds of each stage's own since they were put in place."""

    def __init__(self, slow: dict[str, float]):
        self.seconds, self._slow = dict.fromkeys(STAGES, 0.0), slow
        self._inner: list[float] = []  # of each open call, the seconds of the calls inside of it

    def around(self, call: Callable, stage: str) -> Callable:
        def timed(*args, **kwargs):
            self._inner.append(0.0)
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                own = now() - began - self._inner.pop()
                self.seconds[stage] += own + waste(own * (self._slow.get(stage, 1.0) - 1.0))
                if self._inner:
                    self._inner[-1] += now() - began

        return timed


def waste(seconds: float) -> float:
    """Be busy for so long, and say for how long it was."""
    began = now()
    while (spent := now() - began) < seconds:
        pass
    return spent


@contextmanager
def timing(assistant: Assistant, slow: dict[str, float] | None = None) -> Iterator[Timers]:
    """Timers around the assistant's calls, one after another in this thread.

    Args:
        slow: stage -> how many times as long it takes, to see it reported.
    """
    timers = Timers(slow or {})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(assistant, "threads", InTurn()))
        for owner, name, stage in points(assistant):
            stack.enter_context(
                mock.patch.object(owner, name, timers.around(getattr(owner, name), stage))
            )
        yield timers


def answering(
    assistant: Assistant, audio: np.ndarray, slow: dict[str, float] | None = None
) -> Side:
    """A side that answers the recording (S,): its stages, and what a person notices."""

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
