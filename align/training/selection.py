"""Which utterances of a data set a training uses: for training, for validation, for the test."""

from collections.abc import Sequence
from dataclasses import dataclass

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.splits import leave_out_unknown_splits, split_of
from tiny_align.align.data.utterance import Utterance
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.runtime.errors import DataError

MIN_USER_UTTERANCES = 2
MIN_GENERAL_UTTERANCES = 50
MAX_GENERAL_VALIDATION = 480
MAX_GENERAL_TEST = 40  # the LLM answers each, before and after


@dataclass(frozen=True)
class Splits:
    """The utterances of each split."""

    training: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]


def select_for_user(
    utterances: Sequence[Utterance], limits: TrainingLimits, report: DataReport
) -> Splits:
    """All of a user's utterances, within the limits; the report counts the others.

    Raises:
        DataError: no train or test split, or too few utterances to train on.
    """
    leave_out_unknown_splits(utterances, report)
    training = split_of(utterances, "train")
    training = report.first(training, limits.utterances, "of the train split (--utterances)")
    splits = Splits(training, _optional(utterances, "validation"), split_of(utterances, "test"))
    check_enough_for_user(training, report)
    return splits


def select_for_general(
    utterances: Sequence[Utterance], limits: TrainingLimits, report: DataReport
) -> Splits:
    """The utterances for a general projector, of which only the train split is needed.

    Raises:
        DataError: no train split, or too few utterances to train on.
    """
    leave_out_unknown_splits(utterances, report)
    training = split_of(utterances, "train")
    training = report.first(training, limits.utterances, "of the train split (--utterances)")
    check_enough_for_general(training, report)
    validation = report.first(
        _optional(utterances, "validation"),
        MAX_GENERAL_VALIDATION,
        "of the validation split, which are enough",
    )
    test = report.first(
        _optional(utterances, "test"), MAX_GENERAL_TEST, "of the test split, which are enough"
    )
    return Splits(training, validation, test)


def _optional(utterances: Sequence[Utterance], split: str) -> list[Utterance]:
    return [utterance for utterance in utterances if utterance.split == split]


def check_enough_for_user(training: Sequence, report: DataReport) -> None:
    if len(training) < MIN_USER_UTTERANCES:
        raise DataError(
            f"expected at least {MIN_USER_UTTERANCES} recordings to train on, better 25 or more, "
            f"got {len(training)}{_reasons(report)}"
        )


def check_enough_for_general(training: Sequence, report: DataReport) -> None:
    if len(training) < MIN_GENERAL_UTTERANCES:
        raise DataError(
            f"expected at least {MIN_GENERAL_UTTERANCES} recordings to train a general projector "
            f"on, better thousands, by many speakers, got {len(training)}{_reasons(report)}"
        )


def _reasons(report: DataReport) -> str:
    return f" ({report.explained()})" if report.left_out else ""
