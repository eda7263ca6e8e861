"""One answer, stage by stage: timers put around the runtime's own calls, so that what is timed is what runs.

A stage's seconds are its own, without those of the stages that it calls, on the harness's clock. What no timer is
around is the answer's unexplained share. The runtime knows nothing of it; a name that it no longer has fails at once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np

from tiny_align.benchmarks.harness import Side, now
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.llm import TextStream

FIRST, PER_TOKEN, ANSWER = "to first token", "per token", "answer"
STAGES = ("front end", "encoder", "projector", "readout", "prompt", "prefill", "decode", "text")


def points(assistant: Assistant) -> list[tuple[object, str, str | Callable]]:
    """Owner, attribute and stage of every call that is timed; a stage may depend on the call's arguments."""
    return [
        (assistant, "features", "front end"),  # and the checks around it
        (assistant, "encode", "encoder"),
        (assistant, "soft_tokens", "readout"),  # all of it but the graph
        (assistant, "_projector", "projector"),
        (assistant.llm, "assemble", "prompt"),
        (assistant.llm, "prefill", lambda _, cache: "decode" if cache.length else "prefill"),
        (TextStream, "push", "text"),
    ]


class Timers:
    """Seconds of each stage's own since they were put in place."""

    def __init__(self, slow: dict[str, float]):
        self.seconds, self._slow = dict.fromkeys(STAGES, 0.0), slow
        self._inner: list[float] = []  # of each open call, the seconds of the calls inside of it

    def around(self, call: Callable, stage: str | Callable) -> Callable:
        def timed(*args, **kwargs):
            name = stage if isinstance(stage, str) else stage(*args, **kwargs)
            self._inner.append(0.0)
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                own = now() - began - self._inner.pop()
                self.seconds[name] += own + waste(own * (self._slow.get(name, 1.0) - 1.0))
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
    """Timers around the assistant's calls; `slow` makes a stage take so many times as long, to see it reported."""
    timers = Timers(slow or {})
    with ExitStack() as stack:
        for owner, name, stage in points(assistant):
            stack.enter_context(mock.patch.object(owner, name, timers.around(getattr(owner, name), stage)))
        yield timers


def answering(assistant: Assistant, audio: np.ndarray, slow: dict[str, float] | None = None) -> Side:
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
