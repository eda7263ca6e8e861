"""What a trainer asks of an objective, and an objective of its options: interfaces only."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from tiny_align.align.data.examples import Example


class Objective(Protocol):
    """What a projector is trained for: a loss over a batch of utterances.

    It is made once per training and called once per step.
    """

    @property
    def table(self) -> Tensor:
        """(K, D) embeddings of the speech vocabulary, which the loss is bound to."""

    def __call__(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        """The loss of a batch: a scalar with a gradient.

        Args:
            outputs: the projector's, (B, T, D) where it pools, else (B, N', D + 1).
            lengths: (B,) how many rows of each utterance count.
            examples: the B utterances; their tokens are rows of `table`.
            step: the number of steps done.
        """


@runtime_checkable
class HasTokenErrorRate(Protocol):
    """An objective with a better measure of weights than its loss."""

    def token_error_rate(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> float:
        """Wrong, missing and extra tokens over those of the transcripts; arguments as above."""


class ObjectiveOptions(Protocol):
    """The part of align.training.trainer.TrainOptions that an objective needs."""

    @property
    def objective(self) -> str:
        """Its name, one of FRAMED and POOLED."""

    @property
    def flat_start(self) -> int:
        """Steps with cast targets, before "ctc" and "aligned" find the places themselves."""
