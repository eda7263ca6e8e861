"""When is the shortcut trained?

If the general projector gets more than 20 % of a user's tokens wrong (`shortcut_threshold`), we
also train a shortcut: a linear map from the lowest exported encoder layer to the projector's output
(model/projector.py). For all other users, and in the general training, it stays as it is.
"""

from collections.abc import Sequence

from tiny_align.align.data.examples import Example
from tiny_align.align.model.projector import BridgeFormer
from tiny_align.align.training.validation import Validator

SHORTCUT = "shortcut"  # prefix of its parameters' names


def needs_shortcut(
    general: BridgeFormer,
    examples: Sequence[Example],
    validator: Validator,
    shortcut_threshold: float | None,
) -> bool:
    """True if the general projector's token error rate exceeds `shortcut_threshold`.

    None, or an objective without a token error rate: False.

    Args:
        examples: all of the user's, as the general projector was trained on none of them.
    """
    if shortcut_threshold is None or not validator.has_error_rate:
        return False
    return validator.score(general, examples, step=0).error_rate > shortcut_threshold


def choose_trainable(
    projector: BridgeFormer, trainable: tuple[str, ...], with_shortcut: bool
) -> None:
    """Freeze every parameter that a training must not change.

    Args:
        trainable: prefixes of the names of the trainable parameters; (): all of them.
        with_shortcut: whether the shortcut is trained beside them.
    """
    for name, parameter in projector.named_parameters():
        if name.startswith(SHORTCUT):
            parameter.requires_grad_(with_shortcut)
        else:
            parameter.requires_grad_(not trainable or name.startswith(trainable))
