"""The limits of a training: steps, seconds, utterances, threads. Importing it loads no PyTorch."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from tiny_align.align.model import objectives
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.checks import check_fields


@dataclass(frozen=True)
class TrainingLimits:
    """The limits that a caller sets; None leaves the default.

    Raises:
        TinyAlignError: a number out of its range.
    """

    steps: int | None = None
    max_seconds: float | None = None
    utterances: int | None = None  # only the first so many of the train split
    seed: int = 0
    threads: int | None = None  # CPU threads; None: all cores
    objective: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "steps", "max_seconds", "utterances", "seed", "threads")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "TrainingLimits":
        """The limits of a command's options."""
        return cls(
            steps=args.steps,
            max_seconds=args.max_seconds,
            utterances=args.utterances,
            seed=args.seed,
            threads=args.threads,
            objective=args.objective,
        )


def share_cores() -> None:
    """Let PyTorch's threads sleep while they wait: spinning, they take a core that others want.

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
