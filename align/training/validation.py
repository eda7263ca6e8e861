"""Validation: which examples judge a training, and how good a projector is on them."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tiny_align.align.data.examples import Example, feature_key
from tiny_align.align.model.objectives.base import HasTokenErrorRate, Objective
from tiny_align.align.model.projector import BridgeFormer
from tiny_align.align.model.windows import project
from tiny_align.runtime.windows import WindowSpec

MIN_VALIDATION = 4  # examples, if one in five is as many
BATCH = 64  # examples that are measured together


@dataclass(frozen=True, order=True)
class Score:
    """How good a projector is: smaller is better.

    Where two error rates are equal, the losses decide.
    """

    error_rate: float  # of tokens; the loss if the objective has no such rate
    loss: float

    @classmethod
    def from_curve(cls, entry: dict) -> "Score":
        """The score in an entry of a training record's curve."""
        return cls(entry["held_out"], entry["held_out_loss"])

    def curve_entry(self) -> dict[str, float]:
        return {"held_out": self.error_rate, "held_out_loss": self.loss}

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.error_rate) and np.isfinite(self.loss))


def split_examples(
    examples: Sequence[Example], share: float
) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples, `share` of them for validation.

    If they are few, at least one in five is for validation, up to MIN_VALIDATION: one or two could
    not judge a training. A recording's own features decide, so that it stays in the training split
    when others are added (if there are twenty or more).
    """
    n_min = min(MIN_VALIDATION, len(examples) // 5)
    if n_min == 0:
        return list(examples), []
    draws = [zlib.crc32(feature_key(example.features)) / 2**32 for example in examples]
    threshold = max(share, sorted(draws)[n_min - 1])
    training = []
    validation = []
    for example, draw in zip(examples, draws):
        if draw <= threshold:
            validation.append(example)
        else:
            training.append(example)
    return training, validation


class Validator:
    """Measures projectors by an objective.

    Args:
        last_step: the loss is always that of this step, so that all scores can be compared, also
            with one from before the end of a flat start.
    """

    def __init__(self, objective: Objective, windows: WindowSpec | None, last_step: int):
        self.objective = objective
        self.windows = windows
        self.last_step = last_step

    @property
    def has_error_rate(self) -> bool:
        """Whether the objective measures a token error rate; else its loss is all there is."""
        return isinstance(self.objective, HasTokenErrorRate)

    @torch.no_grad()
    def score(self, projector: BridgeFormer, examples: Sequence[Example], step: int) -> Score:
        """The mean over all tokens, where an example without a word counts as one token.

        Args:
            step: of the training; the loss may stand in for an error rate, and depends on it.
        """
        device = next(projector.parameters()).device
        rows = []
        weights = []
        for start in range(0, len(examples), BATCH):
            batch = list(examples[start : start + BATCH])
            features = [example.tensor().to(device) for example in batch]
            outputs, lengths = project(projector, features, self.windows)
            loss = float(self.objective(outputs, lengths, batch, self.last_step))
            if isinstance(self.objective, HasTokenErrorRate):
                error_rate = self.objective.token_error_rate(outputs, lengths, batch, step)
            else:
                error_rate = float(self.objective(outputs, lengths, batch, step))
            rows.append((error_rate, loss))
            weights.append(sum(len(example.tokens) or 1 for example in batch))
        return Score(*np.average(rows, axis=0, weights=weights).tolist())
