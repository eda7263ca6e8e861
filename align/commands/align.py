"""`tiny-align align`: one person's projector, from their recordings to users/NAME, measured before and after.

The person's `train` split is trained on, the `test` split only measured. A run that is killed leaves the person's
old projector as it was, and the same command resumes it. A `validation` split judges the training, where there is
one. Utterances that cannot be used are left out and named. The bundle's own projector (`--general`) is general.py's.
"""

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.model.objectives import LLM_FREE, check, default_for, make
from tiny_align.runtime.checks import check_fields
from tiny_align.runtime.errors import DataError, TinyAlignError, UserError

AUGMENTATIONS = 3  # of every recording, beside itself
SOUNDS, SOUNDS_SEED = (
    128,
    1,
)  # sounds without a word beside the replay's, which are of the general training's seed (0)


@dataclass(frozen=True)
class TrainingLimits:
    """How much to train; None leaves align.train.TrainOptions' default."""

    steps: int | None = None
    max_seconds: float | None = None
    utterances: int | None = None  # only the first so many of the train split
    seed: int = 0
    threads: int | None = None  # CPU threads; None: all cores
    objective: str | None = None

    def __post_init__(self):
        check_fields(self, "steps", "max_seconds", "utterances", "seed", "threads")

    @classmethod
    def of(cls, args) -> "TrainingLimits":
        return cls(
            args.steps, args.max_seconds, args.utterances, args.seed, args.threads, args.objective
        )


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="metadata folder, NeMo manifest or CHAT transcripts",
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--user", help="the person's name")
    whose.add_argument(
        "--general", action="store_true", help="train the bundle's own projector, for everybody"
    )
    parser.add_argument("--out", type=Path, help="folder for users/NAME (default: the bundle)")
    parser.add_argument("--speaker", help="speaker code, for CHAT transcripts")
    add_training_arguments(parser)


def add_training_arguments(parser) -> None:
    parser.add_argument(
        "--objective", choices=LLM_FREE, help="what to train for (default: ctc; paper if pooled)"
    )
    parser.add_argument("--steps", type=int, help="at most so many steps")
    parser.add_argument("--max-seconds", type=float, help="at most so many seconds of training")
    parser.add_argument(
        "--utterances", type=int, help="use only the first so many of the train split"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def run(args) -> dict:
    share_cores()
    from tiny_align.align.commands.general import generalise
    from tiny_align.align.data.datasets import load_dataset

    if args.general and args.out:
        raise TinyAlignError(
            "--out is for a person's projector, the general one is written into --bundle: leave it out"
        )
    report = DataReport()
    utterances = load_dataset(args.data, args.speaker, report)
    if args.general:
        return generalise(args.bundle, utterances, TrainingLimits.of(args), report=report)
    users = (args.out or args.bundle) / "users"
    result, _, _ = personalise(
        args.bundle, utterances, args.user, users, TrainingLimits.of(args), report=report
    )
    return result


def personalise(
    bundle_path: Path,
    utterances: list,
    user: str,
    users: Path,
    limits: TrainingLimits,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
):
    """Measure, train, write, measure again -> (the command's result, quality before, quality after).

    "Before" is the general projector. A person who is known already is trained on from their own projector, which
    stays unless the new one is better on the validation split or, without one, on utterances held out of the training
    (`improved`).

    Args:
        report: of what was left out before; what cannot be used here is added.

    Raises:
        BundleError, UserError, AudioError, DataError: nothing was written; the person's old projector stays.
    """
    share_cores()
    from tiny_align.align.commands.evaluate import encode_utterances, score
    from tiny_align.align.data.datasets import leave_out_unknown_splits, split_of
    from tiny_align.align.lock import alone
    from tiny_align.align.model.users import load_projector, write_user
    from tiny_align.runtime.assistant import Assistant

    bundle = open_for(bundle_path, limits)
    folder = bundle.user_folder(user, users)
    report = report or DataReport()
    leave_out_unknown_splits(utterances, report)
    training = report.first(
        split_of(utterances, "train"), limits.utterances, "of the train split (--utterances)"
    )
    validation = [utterance for utterance in utterances if utterance.split == "validation"]
    test = split_of(utterances, "test")
    _check_enough(training, report)
    with alone(folder) as work, Assistant.load(bundle, threads=limits.threads) as assistant:
        began = time.perf_counter()
        training = _encoded(assistant, training, work / "features", quiet, report)
        validation = _encoded(assistant, validation, work / "features", quiet, report)
        encode_seconds = time.perf_counter() - began
        _check_enough(training, report)
        heard = encode_utterances(assistant, test, quiet=quiet, report=report)
        report.used = {"train": len(training), "validation": len(validation), "test": len(heard)}
        if not quiet:
            print(report, file=sys.stderr)
        before = score(assistant, heard, quiet=quiet)
        own = _own_or_general(bundle, user, users)
        start = load_projector(bundle, own)
        extend_speech(assistant.llm, bundle.speech_tokens(own).tolist())
        trained = _train(assistant, start, training, validation, work, limits, quiet)
        trained.record["encode_seconds"] += encode_seconds
        trained.record["train_seconds"] += trained.record["encode_seconds"]  # what the person waits
        summary = {
            k: trained.record[k]
            for k in ("steps", "ended_by", "train_seconds", "utterances", "improved")
        }
        write_user(bundle, folder, trained.weights, trained.record, assistant.llm.speech_tokens)
        (work / "state.safetensors").unlink(missing_ok=True)  # the features stay for the next time
        assistant.swap_projector(bundle.projector(user, users))
        after = score(assistant, heard, quiet=quiet)
    result = {
        "user": user,
        "path": str(folder),
        **summary,
        "backend": assistant.backend,
        "n_test": after.n,
    }
    for name in ("rouge1", "rougeL", "wer", "cer"):
        result |= {f"{name}_before": getattr(before, name), f"{name}_after": getattr(after, name)}
    result |= {
        "rougeL_chance": after.rougeL_chance,
        "normaliser": after.normaliser,
        "data": report.document(),
    }
    return result, before, after


def _check_enough(training: list, report: DataReport) -> None:
    if len(training) < 2:
        raise DataError(
            f"{len(training)} recordings to train on: give at least 2, better 25 or more"
            + (f" ({report.explained()})" if report.left_out else "")
        )


def _encoded(
    assistant, utterances: list, folder: Path, quiet: bool, report: DataReport
) -> list[tuple]:
    """(utterance, features of the recording and of each augmentation) for those that can be used."""
    from tqdm import tqdm

    from tiny_align.align.data.feature_cache import cached_features

    def takes(utterance) -> list:
        assistant.llm.encode_words(utterance.text, "the transcript")
        return [
            cached_features(assistant, [utterance], folder, True, augmentation=k)[0]
            for k in range(AUGMENTATIONS + 1)
        ]

    shown = tqdm(
        utterances, desc="encode", unit="utt", disable=quiet or not utterances, mininterval=0.5
    )
    return list(each_usable(shown, takes, report))


def _own_or_general(bundle, user: str, users: Path) -> Path:
    """The projector to go on from: the person's, where there is a sound one for this LLM."""
    try:
        return bundle.projector(user, users)
    except UserError:
        return bundle.graph("projector")


def share_cores() -> None:
    """Let PyTorch's threads sleep while they wait: spinning, they stand still where anything else wants a core.

    OpenMP reads it when PyTorch is loaded: where that was before, or the variable is set, nothing changes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def open_for(path: Path, limits: TrainingLimits):
    """The bundle, if its projector can be trained for the objective; sets the number of threads."""
    import torch

    from tiny_align.runtime.bundle.bundle import Bundle

    if limits.threads:
        torch.set_num_threads(limits.threads)
    bundle = Bundle.open(path)
    if limits.objective:
        check(limits.objective, bundle.manifest.projector["soft_tokens"])
    return bundle


def _train(
    assistant,
    projector,
    training: list,
    validation: list,
    work: Path,
    limits: TrainingLimits,
    quiet: bool,
):
    """Args:
    training, validation: as `_encoded` gives them.
    """
    from tiny_align.align.model.users import load_projector
    from tiny_align.align.training.trainer import Trainer, TrainOptions

    chosen = {name: getattr(limits, name) for name in ("steps", "max_seconds", "seed")}
    chosen["objective"] = limits.objective or default_for(projector.config.soft_tokens)
    options = TrainOptions(**{k: v for k, v in chosen.items() if v is not None})
    utterances, takes = zip(*training, *validation)
    examples = make_examples(assistant.llm, [u.text for u in utterances], list(zip(*takes)))
    used, judges = examples[: len(training)], examples[len(training) :]
    began = time.perf_counter()
    rehearsal = rehearsal_examples(assistant, options.objective, work / "features")
    encode_seconds = time.perf_counter() - began
    objective = make(options, embedding_table(assistant), assistant.bundle.manifest.readout.scale)
    general = load_projector(assistant.bundle, assistant.bundle.graph("projector"))
    trainer = Trainer(
        projector, used, objective, options, work, rehearsal, assistant.windows, general, judges
    )
    trained = trainer.run(quiet)
    trained.record["encode_seconds"] = encode_seconds
    return trained


def make_examples(llm, texts: list[str], takes: list[list]) -> list:
    """Transcripts and features as the trainer takes them, after the LLM's speech vocabulary has got their tokens.

    Args:
        takes: the features of every text's recording, then those of its first augmentation, and so on.
    """
    from tiny_align.align.data.examples import Example

    lines = [llm.encode_words(text) for text in texts]
    extend_speech(llm, (token for line in lines for token in line))
    place = {token: i for i, token in enumerate(llm.speech_tokens.tolist())}
    letters = {
        token: len(llm.tokenizer.decode([token]).strip()) for line in lines for token in line
    }
    return [
        Example(
            features, [place[t] for t in line], [letters[t] for t in line], tuple(augmentations)
        )
        for line, (features, *augmentations) in zip(lines, zip(*takes))
    ]


def extend_speech(llm, tokens: Iterable[int]) -> None:
    """Put the tokens that the LLM's speech vocabulary lacks at its end: no place that is in use changes."""
    import numpy as np

    llm.set_speech_tokens(
        np.array(list(dict.fromkeys([*llm.speech_tokens.tolist(), *tokens])), np.int32)
    )


def rehearsal_examples(assistant, objective: str, folder: Path) -> list:
    """What a person's training goes over beside their recordings: the bundle's replay and, for ctc, more sounds.

    Args:
        folder: keeps the features of the sounds.
    """
    import numpy as np

    from tiny_align.align.data.examples import Example
    from tiny_align.align.data.feature_cache import non_speech_files
    from tiny_align.align.data.rehearsal import read_rehearsal

    replay = read_rehearsal(assistant.bundle.replay)
    if objective != "ctc":
        return [e for e in replay if e.tokens]  # a pooled projector always says something
    return replay + [
        Example(np.load(path, allow_pickle=False), [], [])
        for path in non_speech_files(assistant, SOUNDS, SOUNDS_SEED, folder)
    ]


def embedding_table(assistant):
    """(K, D) float32: what the LLM sees for every token of the speech vocabulary, once its examples are made."""
    import torch

    return torch.from_numpy(assistant.llm.speech_table)
