"""How to train: the options of the trainer. What a caller usually sets is in limits.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the defaults suit a user's hundred utterances on one CPU core."""

    objective: str = "ctc"  # one of align.model.objectives.FRAMED and POOLED
    # steps in which "ctc" and "aligned" cast the targets evenly, before they align them themselves
    flat_start: int = 0
    # prefixes of the names of the trainable parameters, beside the shortcut's; (): all parameters
    trainable: tuple[str, ...] = ("enter",)
    # token error rate of the general projector above which the shortcut is trained (shortcut.py);
    # None: never
    shortcut_threshold: float | None = 0.2
    steps: int | None = None  # None: as many as suit the number of utterances (`steps_for`)
    batch: int = 16
    n_rehearsal: int = 12  # rehearsal examples in every step, beside the batch
    rate: float = 1e-3
    shortcut_rate: float = 2e-3  # of all parameters, if the shortcut is trained
    # Adam's epsilon for the shortcut: small gradients hardly change its many weights
    shortcut_epsilon: float = 1e-3
    warmup: int = 20  # steps
    weight_decay: float = 1.0  # towards the weights that the training began with
    seed: int = 0
    held_out: float = 0.12  # share of the examples that serve as validation set, if there is none
    check_every: int = 50  # steps
    # the training ends early, with its rate at its lowest by then; None: all steps
    max_seconds: float | None = None
    frame_dropout: float = 0.2  # share of the feature frames set to zero
