"""Options that several commands share."""

import argparse

from tiny_align.align.model.objectives import LLM_FREE


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The limits of a training, as `TrainingLimits.from_args` reads them."""
    parser.add_argument(
        "--objective", choices=LLM_FREE, help="what to train for (default: ctc; paper if pooled)"
    )
    parser.add_argument("--steps", type=int, help="maximum number of training steps")
    parser.add_argument("--max-seconds", type=float, help="maximum seconds of training")
    parser.add_argument(
        "--utterances", type=int, help="maximum number of utterances of the train split"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
