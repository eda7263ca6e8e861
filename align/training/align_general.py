"""A bundle's general projector from the recordings of many speakers: `tiny-align align --general`.

The features of all recordings lie on disk, in `.BUNDLE.align` beside the bundle, and a step reads
those of its batch only: they may be more than memory holds. If it is interrupted, the same call
resumes, in the encoding or in the training. The old projector stays unless the new one is better on
the validation examples.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.examples import Example, encode_usable, make_examples
from tiny_align.align.data.feature_cache import Stored, cached_file, non_speech_files
from tiny_align.align.data.utterance import Utterance
from tiny_align.align.evaluation.quality import FIGURES, Quality, encode_utterances, score
from tiny_align.align.lock import training_lock
from tiny_align.align.model import objectives
from tiny_align.align.model.users import load_projector, write_general
from tiny_align.align.training.checkpoint import remove_checkpoint
from tiny_align.align.training.limits import TrainingLimits, open_for_training
from tiny_align.align.training.options import TrainOptions
from tiny_align.align.training.selection import (
    MAX_GENERAL_VALIDATION,
    check_enough_for_general,
    select_for_general,
)
from tiny_align.align.training.trainer import Trained, Trainer, summary
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.files import write_errors
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary

BATCH = 28
MIN_STEPS = 1000
PASSES = 7  # over the utterances
MAX_FLAT_STEPS = 500

# non-speech: one sound beside so many utterances, within bounds; a bundle ships the first of them
UTTERANCES_PER_SOUND = 8
MIN_NON_SPEECH = 64
MAX_NON_SPEECH = 2000
N_REHEARSAL = 64  # utterances whose features a bundle ships for the trainings of its users


def align_general(
    bundle_path: Path,
    utterances: Sequence[Utterance],
    limits: TrainingLimits,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
) -> dict:
    """Encode, train, put the projector into the bundle -> the command's document.

    The `train` split is trained on; the `validation` split, if there is one, judges the training;
    some of the `test` split, if there is one, is answered before and after.

    Args:
        report: what was left out before; utterances that cannot be used here are added.

    Raises:
        BundleError, DataError, AudioError, TinyAlignError: the bundle is unchanged.
    """
    path = Path(bundle_path).resolve()
    report = report or DataReport()
    open_for_training(path, limits)  # refuses before anything is written
    with write_errors(path.parent):
        tempfile.TemporaryFile(dir=path.parent).close()
    with training_lock(path) as work:
        document = _align(path, work, utterances, limits, report, quiet)
    return {"path": str(bundle_path), **document}


def _align(
    path: Path,
    work: Path,
    utterances: Sequence[Utterance],
    limits: TrainingLimits,
    report: DataReport,
    quiet: bool,
) -> dict:
    bundle = open_for_training(path, limits)  # another process may have trained it meanwhile
    splits = select_for_general(utterances, limits, report)
    with Assistant.load(bundle, threads=limits.threads) as assistant:

        def encode(utterance: Utterance) -> Stored:
            return Stored(cached_file(assistant, utterance, work / "features"))

        test = encode_utterances(assistant, splits.test, quiet=quiet, report=report)
        before = None
        if test and bundle.manifest.projector_trained:
            before = score(assistant, test, quiet=quiet)

        training = encode_usable(assistant, splits.training, encode, report, quiet)
        validation = encode_usable(assistant, splits.validation, encode, report, quiet)
        check_enough_for_general(training, report)
        report.used = {"train": len(training), "validation": len(validation), "test": len(test)}
        if not quiet:
            print(report, file=sys.stderr)

        vocabulary = assistant.speech_vocabulary
        examples, vocabulary = _examples(assistant, vocabulary, training)
        validation_examples, vocabulary = _examples(assistant, vocabulary, validation)
        trained = train_general(
            assistant, examples, vocabulary, work, limits, quiet, validation_examples
        )

        assistant.swap_projector(bundle.graph("projector"))
        after = score(assistant, test, quiet=quiet) if test else None
    curve = trained.record["curve"]
    document = {
        "left_out": report.left_out,
        "backend": assistant.backend,
        **summary(trained.record),
        "held_out_before": curve[0]["held_out"],
        "held_out_after": curve[-1]["held_out"],
        "n_test": len(test),
        **_figures(before, "before"),
        **_figures(after, "after"),
    }
    if after:
        document["normaliser"] = after.normaliser
    document["data"] = report.document()
    return document


def _examples(
    assistant: Assistant, vocabulary: SpeechVocabulary, encoded: list[tuple[Utterance, Stored]]
) -> tuple[list[Example], SpeechVocabulary]:
    texts = [utterance.text for utterance, _ in encoded]
    features = [stored for _, stored in encoded]
    return make_examples(assistant.llm, vocabulary, texts, [features])


def _figures(quality: Quality | None, when: str) -> dict[str, float]:
    if quality is None:
        return {}
    return {f"{name}_{when}": getattr(quality, name) for name in FIGURES}


def train_general(
    assistant: Assistant,
    examples: list[Example],
    vocabulary: SpeechVocabulary,
    work: Path,
    limits: TrainingLimits,
    quiet: bool = False,
    validation: Sequence[Example] = (),
) -> Trained:
    """Train the assistant's general projector.

    If it improves, or was untrained, it is written into the bundle.

    Args:
        vocabulary: of the examples' tokens, those of `validation` too.
        work: folder for the checkpoint, until the training ends, and for non-speech features.
        validation: judges the training; if empty, some of the examples are held out for it.

    Returns:
        The weights that the bundle has now, and the record.
    """
    bundle = assistant.bundle
    untrained = not bundle.manifest.projector_trained
    objective = limits.objective
    if objective is None:
        objective = objectives.default_for(bundle.manifest.projector["soft_tokens"])
    options = general_options(len(examples), objective, untrained, limits)
    non_speech = _non_speech_examples(assistant, len(examples), options, work / "features")
    table = torch.from_numpy(vocabulary.table)
    trainer = Trainer(
        load_projector(bundle, bundle.graph("projector")),
        examples,
        objectives.make(options, table, bundle.manifest.readout.scale),
        options,
        work,
        non_speech,
        assistant.windows,
        validation=validation,
    )
    trained = trainer.run(quiet, untrained=untrained)
    if trained.record["improved"] or untrained:
        every = max(1, len(examples) // N_REHEARSAL)  # spread over the data set: many speakers
        rehearsal = examples[::every][:N_REHEARSAL] + non_speech[:MIN_NON_SPEECH]
        write_general(bundle, trained.weights, rehearsal, vocabulary.tokens)
    remove_checkpoint(work)  # the features stay for the next training
    return trained


def _non_speech_examples(
    assistant: Assistant, n_utterances: int, options: TrainOptions, folder: Path
) -> list[Example]:
    """Non-speech in proportion to the utterances; none for a projector that pools."""
    if options.objective != "ctc":
        return []
    n = min(max(n_utterances // UTTERANCES_PER_SOUND, MIN_NON_SPEECH), MAX_NON_SPEECH)
    files = non_speech_files(assistant, n, options.seed, folder)
    return [Example(Stored(file), [], []) for file in files]


def general_options(
    n_utterances: int, objective: str, untrained: bool, limits: TrainingLimits
) -> TrainOptions:
    """How a general projector is trained: all of it but the shortcut, and in many steps."""
    steps = limits.steps or max(MIN_STEPS, PASSES * n_utterances // BATCH)
    eighth = -(-steps // 8)  # rounded up
    tenth = -(-steps // 10)
    return TrainOptions(
        objective=objective,
        trainable=(),
        shortcut_threshold=None,
        flat_start=min(MAX_FLAT_STEPS, steps // 8) if untrained else 0,
        steps=steps,
        batch=BATCH,
        n_rehearsal=4,
        rate=2e-3 if untrained else 1e-3,
        weight_decay=1e-2,
        warmup=min(100, eighth),
        seed=limits.seed,
        held_out=min(TrainOptions.held_out, MAX_GENERAL_VALIDATION / n_utterances),
        check_every=min(200, tenth),
        max_seconds=limits.max_seconds,
    )
