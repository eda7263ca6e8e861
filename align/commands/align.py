"""`tiny-align align`: train a user's projector, or with `--general` the bundle's own.

Both are functions of the training: see align/training/align_user.py and align_general.py.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

from tiny_align.align.training.limits import TrainingLimits, share_cores
from tiny_align.runtime.commands.options import (
    BundleOptions,
    DataOptions,
    TrainedUserOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.errors import TinyAlignError


@dataclass(frozen=True, kw_only=True)
class AlignOptions(DataOptions, TrainedUserOptions, BundleOptions):
    user: str | None = field(
        default=None, metadata=option("the user's name", metavar="NAME", one_of="projector")
    )
    general: bool = field(
        default=False,
        metadata=option("train the bundle's own projector, for all users", one_of="projector"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, AlignOptions)
    add_options(parser, TrainingLimits)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train; the command's document."""
    share_cores()  # before PyTorch is loaded
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.align.training.align_general import align_general
    from tiny_align.align.training.align_user import align_user
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.user_folders import find_users

    options = read_options(args, AlignOptions)
    limits = read_options(args, TrainingLimits)
    if options.general and options.explicit_users:
        option = "--out" if options.out else "--users"
        raise TinyAlignError(
            f"{option} is for a user's projector; the general one is written into --bundle: "
            f"leave {option} away"
        )
    report = DataReport()
    utterances = load_dataset(options.data, options.speaker, report)
    if options.user is None:
        return align_general(options.bundle, utterances, limits, report=report)
    bundle = Bundle.open(options.bundle, verify=False)  # align_user verifies it
    users = find_users(bundle, options.user, options.explicit_users)
    document, _, _ = align_user(
        options.bundle, utterances, options.user, users, limits, report=report
    )
    return document
