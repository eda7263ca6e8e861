"""`tiny-align demo`: the whole story in one command.

Takes the shipped bundle and the shipped recordings of a voice that its encoder was not trained on.
Answers them, trains a projector for that user, answers again while the text streams, and shows both
side by side.
"""

import argparse
import statistics
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_align.align.training.limits import TrainingLimits, share_cores
from tiny_align.runtime.commands.options import (
    ShippedBundleOptions,
    ShippedDataOptions,
    add_options,
    option,
    read_options,
)

if TYPE_CHECKING:
    from tiny_align.align.data.utterance import Utterance
    from tiny_align.align.evaluation.quality import Quality
    from tiny_align.runtime.assistant import Answer

N_ROWS = 8  # answers in the table
N_STREAMED = 5


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ShippedDataOptions, ShippedBundleOptions):
    user: str = field(
        default="demo", metadata=option("the user's name (default: demo)", metavar="NAME")
    )
    out: Path = field(
        default=Path("tiny-align-demo"),
        metadata=option("write the profile to DIR/users (default: tiny-align-demo)", metavar="DIR"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DemoOptions)
    add_options(parser, TrainingLimits)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train a user and show the answers before and after; the command's document."""
    share_cores()  # before PyTorch is loaded
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import load_dataset, split_of
    from tiny_align.align.training.align_user import align_user

    options = read_options(args, DemoOptions)
    limits = read_options(args, TrainingLimits)
    users = options.out / "users"
    report = DataReport()
    utterances = load_dataset(options.data, report=report)
    document, before, after = align_user(
        options.bundle, utterances, options.user, users, limits, report=report
    )
    test = split_of(utterances, "test")
    document |= _stream(options, users, test, limits.threads, quiet=args.json)
    if not args.json:
        _show(before, after, document)
    return document


def _stream(
    options: DemoOptions,
    users: Path,
    utterances: "list[Utterance]",
    threads: int | None,
    *,
    quiet: bool,
) -> dict[str, float]:
    """Answer some of the test recordings, printing the text as it comes.

    Returns:
        Medians of the time to the first token and of the real-time factor.
    """
    from tiny_align.align.data.data_report import DataReport, each_usable
    from tiny_align.runtime.assistant import Assistant, collect
    from tiny_align.runtime.commands.answering import print_events

    answers: list[Answer] = []
    with Assistant.load(options.bundle, options.user, users=users, threads=threads) as assistant:
        recordings = each_usable(utterances, lambda u: u.load(assistant.sample_rate), DataReport())
        for utterance, audio in islice(recordings, N_STREAMED + 1):
            hidden = quiet or not answers  # the first answer warms up
            if not hidden:
                print(f"\n  you said:  {utterance.text}\n  answer:    ", end="", flush=True)
            events = print_events(assistant.stream(audio), quiet=hidden)
            answers.append(collect(events, len(audio) / assistant.sample_rate))
    timed = answers[1:] or answers
    return {
        "ttft_ms": round(statistics.median(a.ttft_s for a in timed) * 1000, 2),
        "rtf": round(statistics.median(a.rtf for a in timed), 4),
    }


def _show(before: "Quality", after: "Quality", document: dict) -> None:
    print(f"\n{'typed answer':42s} | {'spoken, before':42s} | spoken, after")
    for old, new in list(zip(before.rows, after.rows))[:N_ROWS]:
        print(f"{new['typed'][:42]:42s} | {old['spoken'][:42]:42s} | {new['spoken'][:60]}")
    print(f"\n{'':24s} {'before':>8s} {'after':>8s}")
    for name, label in (("rougeL", "ROUGE-L against typed"), ("wer", "word error rate")):
        old, new = document[f"{name}_before"], document[f"{name}_after"]
        print(f"{label:24s} {old:8.3f} {new:8.3f}")
    print(f"{'chance ROUGE-L':24s} {'':8s} {document['rougeL_chance']:8.3f}")
    print(
        f"trained for {document['train_seconds']:.1f} s "
        f"({document['steps']} steps, {document['utterances']} recordings)"
    )
    print(
        f"time to first token {document['ttft_ms']:.0f} ms, "
        f"real-time factor {document['rtf']:.3f}, {document['backend']}"
    )
    print(f"written to {document['path']}")
