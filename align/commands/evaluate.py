"""`tiny-align eval`: alignment quality on a data set (align/evaluation/quality.py)."""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="metadata folder, NeMo manifest or CHAT transcripts",
    )
    parser.add_argument("--user", help="measure this user's projector (default: the general one)")
    parser.add_argument(
        "--users", type=Path, help="directory of user profiles (default: BUNDLE/users)"
    )
    parser.add_argument(
        "--split", default="test", help="the split to measure; 'all' for everything"
    )
    parser.add_argument("--instruction", help="what to do with the speech (default: the bundle's)")
    parser.add_argument("--speaker", help="speaker code, for CHAT transcripts")
    parser.add_argument(
        "--rows", action="store_true", help="every utterance's texts in the JSON document too"
    )
    parser.add_argument(
        "--backend", default="onnxruntime", help="onnxruntime (default) or tensorrt"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> dict:
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import SPLITS, load_dataset, split_of
    from tiny_align.align.evaluation.quality import encode_utterances, score
    from tiny_align.runtime.assistant import Assistant

    report = DataReport()
    utterances = load_dataset(args.data, args.speaker, report)
    chosen = utterances if args.split == "all" else split_of(utterances, args.split)
    with Assistant.load(
        args.bundle, args.user, users=args.users, backend=args.backend, threads=args.threads
    ) as assistant:
        encoded = encode_utterances(assistant, chosen, args.instruction, report=report)
        report.used = dict.fromkeys(SPLITS, 0) | Counter(e.split for e in encoded)
        print(report, file=sys.stderr)
        document = asdict(score(assistant, encoded, args.instruction))
    rows = document.pop("rows")
    other_splits = Counter(u.split for u in utterances) - Counter(u.split for u in chosen)
    data = report.document() | {"other_splits": dict(other_splits)}
    document |= {"backend": args.backend, "user": args.user, "data": data}
    if args.rows:
        document["rows"] = rows
    return document
