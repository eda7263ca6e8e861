"""`tiny-align align --general`: a bundle's own projector, for everybody, from the recordings of many people.

The features of all recordings lie on disk, in `.BUNDLE.align` beside the bundle, and a step reads those of its batch
only: they may be more than memory holds. A run that is killed, in the encoding or in the training, goes on with the
same command. The bundle's old projector stays unless the new one is better on recordings held out of the training.
"""

import sys
import tempfile
from pathlib import Path

from tiny_align.align.commands.align import TrainingLimits, embedding_table, make_examples, open_for
from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import Stored, cached_file, non_speech_files
from tiny_align.align.lock import alone
from tiny_align.align.model.objectives import default_for, make
from tiny_align.align.model.users import load_projector, write_general
from tiny_align.align.training.trainer import Trained, Trainer, TrainOptions
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.errors import DataError
from tiny_align.runtime.files import write_errors

LEAST = 50  # utterances
MIN_STEPS, PASSES = 1000, 7  # over the utterances
FLAT_STEPS = 500  # at most an eighth of all
MAX_HELD_OUT = 480  # utterances
SOUNDS_SHARE, MIN_SOUNDS, MAX_SOUNDS = (
    8,
    64,
    2000,
)  # one beside so many utterances; a bundle keeps the least
REPLAYED = 64  # utterances whose features the bundle keeps for the training of a person
MEASURED = 40  # utterances of the test split that the LLM answers before and after


def generalise(
    bundle_path: Path,
    utterances: list,
    limits: TrainingLimits,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
) -> dict:
    """Encode, train, put the projector into the bundle -> the command's result.

    The `train` split is trained on and the `validation` split, where there is one, judges it; where there is a `test`
    split, some of it is answered before and after.

    Args:
        report: of what was left out before; what cannot be used here is added.

    Raises:
        BundleError, DataError, AudioError, TinyAlignError: the bundle is as it was.
    """
    path = Path(bundle_path).resolve()
    open_for(path, limits)  # refuses before anything is written
    with write_errors(path.parent):
        tempfile.TemporaryFile(dir=path.parent).close()
    with alone(path) as work:
        return _generalise(bundle_path, work, utterances, limits, quiet, report or DataReport())


def _generalise(
    bundle_path: Path,
    work: Path,
    utterances: list,
    limits: TrainingLimits,
    quiet: bool,
    report: DataReport,
) -> dict:
    from tiny_align.align.commands.evaluate import encode_utterances, score
    from tiny_align.align.data.datasets import leave_out_unknown_splits, split_of

    bundle = open_for(Path(bundle_path).resolve(), limits)
    leave_out_unknown_splits(utterances, report)
    training = report.first(
        split_of(utterances, "train"), limits.utterances, "of the train split (--utterances)"
    )
    _check_enough(training, report)
    validation = [u for u in utterances if u.split == "validation"]
    validation = report.first(validation, MAX_HELD_OUT, "of the validation split, which are enough")
    test = report.first(
        [u for u in utterances if u.split == "test"],
        MEASURED,
        "of the test split, which are enough",
    )
    with Assistant.load(bundle, threads=limits.threads) as assistant:
        heard = encode_utterances(assistant, test, quiet=quiet, report=report)
        before = (
            score(assistant, heard, quiet=quiet)
            if heard and bundle.manifest.projector_trained
            else None
        )
        training = _stored(assistant, training, work / "features", quiet, report)
        validation = _stored(assistant, validation, work / "features", quiet, report)
        _check_enough(training, report)
        report.used = {"train": len(training), "validation": len(validation), "test": len(heard)}
        if not quiet:
            print(report, file=sys.stderr)
        utterances, features = zip(*training, *validation)
        examples = make_examples(assistant.llm, [u.text for u in utterances], [features])
        used, judges = examples[: len(training)], examples[len(training) :]
        trained = train_general(assistant, used, work, limits, quiet, judges)
        assistant.swap_projector(bundle.graph("projector"))
        after = score(assistant, heard, quiet=quiet) if heard else None
    curve = trained.record["curve"]
    result = {"path": str(bundle_path), "left_out": report.left_out, "backend": assistant.backend}
    result |= {
        k: trained.record[k]
        for k in ("steps", "ended_by", "train_seconds", "utterances", "improved")
    }
    result |= {
        "held_out_before": curve[0]["held_out"],
        "held_out_after": curve[-1]["held_out"],
        "n_test": len(heard),
    }
    for when, quality in (("before", before), ("after", after)):
        names = ("rouge1", "rougeL", "wer", "cer") if quality else ()
        result |= {f"{name}_{when}": getattr(quality, name) for name in names}
    return (
        result | ({"normaliser": after.normaliser} if after else {}) | {"data": report.document()}
    )


def _check_enough(training: list, report: DataReport) -> None:
    if len(training) < LEAST:
        raise DataError(
            f"{len(training)} recordings that can be trained on: a general projector needs at least {LEAST}, "
            "better thousands, by many people"
            + (f" ({report.explained()})" if report.left_out else "")
        )


def _stored(
    assistant: Assistant, utterances: list, folder: Path, quiet: bool, report: DataReport
) -> list[tuple]:
    """(utterance, its features in `folder`) for those that can be used."""
    from tqdm import tqdm

    def stored(utterance) -> Stored:
        assistant.llm.encode_words(utterance.text, "the transcript")
        return Stored(cached_file(assistant, utterance, folder))

    shown = tqdm(
        utterances, desc="encode", unit="utt", disable=quiet or not utterances, mininterval=0.5
    )
    return list(each_usable(shown, stored, report))


def train_general(
    assistant: Assistant,
    examples: list[Example],
    work: Path,
    limits: TrainingLimits,
    quiet: bool = False,
    validation: list[Example] = (),
) -> Trained:
    """Train the assistant's general projector on; what is better than it, or than an untrained one, is the bundle's.

    Args:
        work: where the state of the training is kept until it ends, and the features of sounds without a word.
        validation: what judges the training; none: some of the examples are held out of it.
    Returns:
        The weights that the bundle has now, and the record.
    """
    bundle = assistant.bundle
    untrained = not bundle.manifest.projector_trained
    objective = limits.objective or default_for(bundle.manifest.projector["soft_tokens"])
    options = options_for(len(examples), objective, untrained, limits)
    n_sounds = (
        min(max(len(examples) // SOUNDS_SHARE, MIN_SOUNDS), MAX_SOUNDS) if objective == "ctc" else 0
    )
    sounds = non_speech_files(assistant, n_sounds, limits.seed, work / "features")
    wordless = [Example(Stored(path), [], []) for path in sounds]
    projector = load_projector(bundle, bundle.graph("projector"))
    target = make(options, embedding_table(assistant), bundle.manifest.readout.scale)
    trainer = Trainer(
        projector,
        examples,
        target,
        options,
        work,
        wordless,
        assistant.windows,
        validation=validation,
    )
    trained = trainer.run(quiet, untrained=untrained)
    if trained.record["improved"] or untrained:
        spread = examples[:: max(1, len(examples) // REPLAYED)][
            :REPLAYED
        ]  # of many people, where they come in turn
        write_general(
            bundle, trained.weights, spread + wordless[:MIN_SOUNDS], assistant.llm.speech_tokens
        )
    (work / "state.safetensors").unlink(missing_ok=True)  # the features stay for the next time
    return trained


def options_for(n: int, objective: str, untrained: bool, limits: TrainingLimits) -> TrainOptions:
    """How a general projector is trained on `n` utterances: every part of it but a person's, and for long."""
    batch = 28
    steps = limits.steps or max(MIN_STEPS, PASSES * n // batch)
    return TrainOptions(
        objective=objective,
        trainable=(),
        shortcut_threshold=None,
        flat_start=min(FLAT_STEPS, steps // 8) if untrained else 0,
        steps=steps,
        batch=batch,
        n_rehearsal=4,
        rate=2e-3 if untrained else 1e-3,
        weight_decay=1e-2,
        warmup=min(100, -(-steps // 8)),
        seed=limits.seed,
        held_out=min(TrainOptions.held_out, MAX_HELD_OUT / n),
        check_every=min(200, -(-steps // 10)),
        max_seconds=limits.max_seconds,
    )
