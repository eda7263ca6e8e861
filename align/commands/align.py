"""`tiny-align align`: train a user's projector, or with `--general` the bundle's own.

Both are functions of the training: see align/training/align_user.py and align_general.py.
"""

import argparse
from pathlib import Path

from tiny_align.align.commands.options import add_training_arguments
from tiny_align.runtime.errors import TinyAlignError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="metadata folder, NeMo manifest or CHAT transcripts",
    )
    projector = parser.add_mutually_exclusive_group(required=True)
    projector.add_argument("--user", help="the user's name")
    projector.add_argument(
        "--general", action="store_true", help="train the bundle's own projector, for all users"
    )
    parser.add_argument("--out", type=Path, help="folder for users/NAME (default: the bundle)")
    parser.add_argument("--speaker", help="speaker code, for CHAT transcripts")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> dict:
    from tiny_align.align.training.limits import TrainingLimits, share_cores

    share_cores()  # before PyTorch is loaded
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.align.training.align_general import align_general
    from tiny_align.align.training.align_user import align_user

    if args.general and args.out:
        raise TinyAlignError(
            "--out is for a user's projector; the general one is written into --bundle: "
            "leave --out away"
        )
    report = DataReport()
    limits = TrainingLimits.from_args(args)
    utterances = load_dataset(args.data, args.speaker, report)
    if args.general:
        return align_general(args.bundle, utterances, limits, report=report)
    users = (args.out or args.bundle) / "users"
    document, _, _ = align_user(args.bundle, utterances, args.user, users, limits, report=report)
    return document
