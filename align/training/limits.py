"""The limits of a training: steps, seconds, utterances, threads. Importing it loads no PyTorch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from tiny_align.align.model import objectives
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.checks import check_fields
from tiny_align.runtime.commands.options import ThreadOptions, option


@dataclass(frozen=True, kw_only=True)
class TrainingLimits(ThreadOptions):
    """The limits that a caller, or the options of a command, set; None leaves the default.

    Raises:
        TinyAlignError: a number out of its range.
    """

    objective: str | None = field(
        default=None,
        metadata=option(
            "what to train for (default: ctc; paper if pooled)", choices=objectives.LLM_FREE
        ),
    )
    steps: int | None = field(
        default=None, metadata=option("maximum number of training steps", metavar="N")
    )
    max_seconds: float | None = field(
        default=None, metadata=option("maximum seconds of training", metavar="S")
    )
    utterances: int | None = field(
        default=None,
        metadata=option("train on the first N utterances of the train split", metavar="N"),
    )
    seed: int = field(default=0, metadata=option("seed of the training (default: 0)", metavar="N"))

    def __post_init__(self) -> None:
        check_fields(self, "steps", "max_seconds", "utterances", "seed", "threads")


def share_cores() -> None:
    """Let PyTorch's threads sleep while they wait: by spinning they would keep cores from others.

    OpenMP reads the variable when PyTorch is loaded, so call this before. If it is set, it stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def open_for_training(path: Path, limits: TrainingLimits) -> Bundle:
    """Set PyTorch's number of threads and open the bundle.

    Raises:
        TinyAlignError: the bundle's projector cannot be trained for the objective.
    """
    import torch

    if limits.threads:
        torch.set_num_threads(limits.threads)
    bundle = Bundle.open(path)
    if limits.objective:
        objectives.check(limits.objective, bundle.manifest.projector["soft_tokens"])
    return bundle
