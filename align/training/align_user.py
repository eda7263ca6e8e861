"""A user's projector from their recordings, measured before and after: `tiny-align align`.

The `train` split is trained on; the `validation` split, if there is one, judges the training; the
`test` split is only measured. Utterances that cannot be used are left out and named. If a training
is interrupted, the user's old projector stays, and the same call resumes.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.examples import Example, encode_usable, make_examples
from tiny_align.align.data.feature_cache import cached_features
from tiny_align.align.data.rehearsal import rehearsal_examples
from tiny_align.align.data.utterance import Utterance
from tiny_align.align.evaluation.quality import (
    FIGURES,
    EncodedUtterance,
    Quality,
    encode_utterances,
    score,
)
from tiny_align.align.lock import training_lock
from tiny_align.align.model import objectives
from tiny_align.align.model.projector import BridgeFormer
from tiny_align.align.model.users import load_projector, write_user
from tiny_align.align.training.checkpoint import remove_checkpoint
from tiny_align.align.training.limits import TrainingLimits, open_for_training
from tiny_align.align.training.selection import Splits, check_enough_for_user, select_for_user
from tiny_align.align.training.trainer import Trained, Trainer, TrainOptions, summary
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary

AUGMENTATIONS = 3  # of every recording, beside itself

EncodedTakes = tuple[Utterance, list[np.ndarray]]  # features of the recording, then augmentations


@dataclass(frozen=True)
class EncodedSplits:
    """The splits' utterances after the encoder."""

    training: list[EncodedTakes]
    validation: list[EncodedTakes]
    test: list[EncodedUtterance]
    seconds: float  # for the first two


def align_user(
    bundle_path: Path,
    utterances: Sequence[Utterance],
    user: str,
    users: Path,
    limits: TrainingLimits,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
) -> tuple[dict, Quality, Quality]:
    """Prepare, score, train, save, score again.

    The score before is the general projector's. The training begins with the user's own projector,
    if there is one, and keeps it unless the new one is better on the validation examples
    (`improved`).

    Args:
        report: what was left out before; utterances that cannot be used here are added.

    Returns:
        The command's document, and the quality before and after.

    Raises:
        BundleError, UserError, AudioError, DataError: nothing was written; the user's old projector
            stays.
    """
    report = report or DataReport()
    bundle = open_for_training(bundle_path, limits)
    folder = bundle.user_folder(user, users)
    splits = select_for_user(utterances, limits, report)
    with (
        training_lock(folder) as work,
        Assistant.load(bundle, threads=limits.threads) as assistant,
    ):
        encoded = _prepare(assistant, splits, work / "features", report, quiet)
        before = score(assistant, encoded.test, quiet=quiet)

        start = _own_or_general(bundle, user, users)
        trained, vocabulary = _train(assistant, start, encoded, work, limits, quiet)

        write_user(bundle, folder, trained.weights, trained.record, vocabulary.tokens)
        remove_checkpoint(work)  # the features stay for the next training

        assistant.swap_projector(bundle.projector(user, users))
        after = score(assistant, encoded.test, quiet=quiet)
    document = {
        "user": user,
        "path": str(folder),
        **summary(trained.record),
        "backend": assistant.backend,
        **_figures(before, after),
        "data": report.document(),
    }
    return document, before, after


def _prepare(
    assistant: Assistant, splits: Splits, cache: Path, report: DataReport, quiet: bool
) -> EncodedSplits:
    """Encode every utterance that can be used."""

    def encode(utterance: Utterance) -> list[np.ndarray]:
        takes = []
        for k in range(AUGMENTATIONS + 1):
            takes += cached_features(assistant, [utterance], cache, quiet=True, augmentation=k)
        return takes

    began = time.perf_counter()
    training = encode_usable(assistant, splits.training, encode, report, quiet)
    validation = encode_usable(assistant, splits.validation, encode, report, quiet)
    seconds = time.perf_counter() - began
    check_enough_for_user(training, report)
    test = encode_utterances(assistant, splits.test, quiet=quiet, report=report)
    report.used = {"train": len(training), "validation": len(validation), "test": len(test)}
    if not quiet:
        print(report, file=sys.stderr)
    return EncodedSplits(training, validation, test, seconds)


def _own_or_general(bundle: Bundle, user: str, users: Path) -> Path:
    """The user's projector, if there is one for this encoder and LLM, or else the general one."""
    try:
        return bundle.projector(user, users)
    except UserError:
        return bundle.graph("projector")


def _train(
    assistant: Assistant,
    start: Path,
    encoded: EncodedSplits,
    work: Path,
    limits: TrainingLimits,
    quiet: bool,
) -> tuple[Trained, SpeechVocabulary]:
    """Train a user's projector, from the weights beside the graph `start`.

    Returns:
        The weights and the record, whose seconds include the encoding; and the speech vocabulary:
        the general one, then what `start` and the transcripts add.
    """
    bundle = assistant.bundle
    projector = load_projector(bundle, start)
    options = user_options(limits, projector)
    vocabulary = assistant.speech_vocabulary.extended(bundle.speech_tokens(start).tolist())
    training, vocabulary = _examples(assistant, vocabulary, encoded.training)
    validation, vocabulary = _examples(assistant, vocabulary, encoded.validation)
    began = time.perf_counter()
    rehearsal = rehearsal_examples(assistant, options.objective, work / "features")
    rehearsal_seconds = time.perf_counter() - began

    table = torch.from_numpy(vocabulary.table)
    trainer = Trainer(
        projector,
        training,
        objectives.make(options, table, bundle.manifest.readout.scale),
        options,
        work,
        rehearsal,
        assistant.windows,
        general=load_projector(bundle, bundle.graph("projector")),
        validation=validation,
    )
    trained = trainer.run(quiet)
    encode_seconds = rehearsal_seconds + encoded.seconds
    trained.record["encode_seconds"] = encode_seconds
    trained.record["train_seconds"] += encode_seconds  # what the user waits
    return trained, vocabulary


def _figures(before: Quality, after: Quality) -> dict[str, Any]:
    """The document's figures of both qualities."""
    figures: dict[str, Any] = {"n_test": after.n}
    for name in FIGURES:
        figures[f"{name}_before"] = getattr(before, name)
        figures[f"{name}_after"] = getattr(after, name)
    figures["rougeL_chance"] = after.rougeL_chance
    figures["normaliser"] = after.normaliser
    return figures


def user_options(limits: TrainingLimits, projector: BridgeFormer) -> TrainOptions:
    """How a user's projector is trained: the defaults, within the limits."""
    return TrainOptions(
        objective=limits.objective or objectives.default_for(projector.config.soft_tokens),
        steps=limits.steps,
        max_seconds=limits.max_seconds,
        seed=limits.seed,
    )


def _examples(
    assistant: Assistant, vocabulary: SpeechVocabulary, encoded: list[EncodedTakes]
) -> tuple[list[Example], SpeechVocabulary]:
    texts = [utterance.text for utterance, _ in encoded]
    takes = list(zip(*(features for _, features in encoded)))
    return make_examples(assistant.llm, vocabulary, texts, takes)
