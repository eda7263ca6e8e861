"""One utterance for training: features, tokens and augmentations."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tiny_align.align.data.feature_cache import Stored, array_of


@dataclass(frozen=True)
class Example:
    """One utterance for training."""

    features: np.ndarray | Stored  # (N, Da) float32
    tokens: list[int]  # places in the speech vocabulary, which are rows of the objective's table
    token_lengths: list[int]  # letters
    augmentations: tuple[
        np.ndarray | Stored, ...
    ] = ()  # features of the recording made a little differently
    answers: tuple[
        tuple[int, ...], ...
    ] = ()  # token ids, the end's included, for each prompt of "end-to-end"

    def take(self, rng: np.random.Generator | None) -> Tensor:
        """(N, Da): the recording itself or, with `rng`, one of its augmentations too."""
        takes = (self.features, *self.augmentations)
        return torch.from_numpy(array_of(takes[rng.integers(len(takes)) if rng else 0]))

    def takes(self) -> list["Example"]:
        """The recording and each augmentation as an example of its own."""
        return [
            replace(self, features=features, augmentations=())
            for features in (self.features, *self.augmentations)
        ]
