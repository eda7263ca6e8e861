"""`tiny-align eval`: alignment quality on a data set (align/evaluation/quality.py)."""

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tiny_align.runtime.commands.options import (
    AssistantOptions,
    DataOptions,
    add_options,
    option,
    read_options,
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(DataOptions, AssistantOptions):
    split: str = field(
        default="test",
        metadata=option(
            "the split to measure, or all for everything (default: test)", metavar="NAME"
        ),
    )
    rows: bool = field(
        default=False, metadata=option("every utterance's texts in the JSON document too")
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EvalOptions)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the command's document."""
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import SPLITS, load_dataset, split_of
    from tiny_align.align.evaluation.quality import encode_utterances, score
    from tiny_align.runtime.assistant import Assistant

    options = read_options(args, EvalOptions)
    report = DataReport()
    utterances = load_dataset(options.data, options.speaker, report)
    chosen = utterances if options.split == "all" else split_of(utterances, options.split)
    with Assistant.load(
        options.bundle,
        options.user,
        users=options.users,
        backend=options.backend,
        threads=options.threads,
    ) as assistant:
        encoded = encode_utterances(assistant, chosen, options.instruction, report=report)
        report.used = dict.fromkeys(SPLITS, 0) | Counter(e.split for e in encoded)
        print(report, file=sys.stderr)
        document = asdict(score(assistant, encoded, options.instruction))
    rows = document.pop("rows")
    other_splits = Counter(u.split for u in utterances) - Counter(u.split for u in chosen)
    data = report.document() | {"other_splits": dict(other_splits)}
    document |= {"backend": options.backend, "user": options.user, "data": data}
    if options.rows:
        document["rows"] = rows
    return document
