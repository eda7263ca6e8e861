"""The stages of an answer, as a program that times them sees them: see `Assistant.observe`."""

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

STAGES = ("front end", "encoder", "projector", "readout", "prompt", "prefill", "decode", "text")

UNOBSERVED = contextlib.nullcontext()


class StageRecorder(Protocol):
    """What observes an assistant."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Give a context in which one of STAGES runs once. Stages nest."""


class Stage(Protocol):
    """Gives the context in which a stage of the runtime runs."""

    def __call__(self, name: str) -> AbstractContextManager[object]: ...
