"""The state of an interrupted training on disk: a safetensors file in the work folder.

The same training resumes from it; a `fingerprint` tells whether it is the same.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tiny_align.align.data.examples import Example, feature_key
from tiny_align.align.training.options import TrainOptions
from tiny_align.runtime.files import written_file

STATE_FILE = "state.safetensors"
FORMAT = 5  # of the file: one of another format is not resumed

log = logging.getLogger(__name__)

Optimisers = Sequence[torch.optim.Optimizer]


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0  # steps done
    curve: list[dict] = field(default_factory=list)  # an entry per check
    spent_s: float = 0.0


class Checkpoint:
    """The state file of one training.

    Args:
        fingerprint: of the training, see `fingerprint`.
    """

    def __init__(self, work: Path, fingerprint: str):
        self.path = work / STATE_FILE
        self.fingerprint = fingerprint

    def save(
        self, progress: Progress, projector: nn.Module, mean: nn.Module, optimisers: Optimisers
    ) -> None:
        """Write the state, whole or not at all.

        Raises:
            TinyAlignError: the work folder cannot be written.
        """
        tensors = {f"now.{name}": value for name, value in copy_weights(projector).items()}
        for name, value in copy_weights(mean).items():
            tensors[f"mean.{name}"] = value
        for i, optimiser in enumerate(optimisers):
            for j, state in optimiser.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimiser.{i}.{j}.{name}"] = value
        numbers = {"fingerprint": self.fingerprint, **asdict(progress)}
        with written_file(self.path) as temporary:
            temporary.write_bytes(save(tensors, {"numbers": json.dumps(numbers)}))

    def load(
        self, projector: nn.Module, mean: nn.Module, optimisers: Optimisers
    ) -> Progress | None:
        """Read the state into its arguments.

        Returns:
            None if there is no state of this training; a damaged one is logged.
        """
        if not self.path.exists():
            return None
        numbers, tensors = self._read()
        if numbers.pop("fingerprint", None) != self.fingerprint:
            return None
        projector.load_state_dict(_strip_prefix(tensors, "now."))
        mean.load_state_dict(_strip_prefix(tensors, "mean."))
        for i, optimiser in enumerate(optimisers):
            state = optimiser.state_dict()
            for key, value in _strip_prefix(tensors, f"optimiser.{i}.").items():
                index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
            optimiser.load_state_dict(state)
        return Progress(**numbers)

    def _read(self) -> tuple[dict, dict[str, Tensor]]:
        """The file's numbers and tensors; empty if it is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                numbers = dict(json.loads(file.metadata()["numbers"]))
                names = file.keys()  # safe_open's file is no mapping
                return numbers, {name: file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s): training starts from the beginning", self.path, error)
            return {}, {}


def remove_checkpoint(work: Path) -> None:
    (work / STATE_FILE).unlink(missing_ok=True)


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fingerprint(
    projectors: Iterable[nn.Module],
    examples: Iterable[Example],
    n_validation: int,
    table: Tensor,
    options: TrainOptions,
) -> str:
    """Identify a training by all that determines its result.

    Args:
        projectors: with the weights that it begins with, and the general ones.
        examples: all of them, the validation examples first.
        table: the embeddings that the objective is bound to.
    """
    digest = hashlib.sha256(repr((FORMAT, options)).encode())
    digest.update(table.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    for projector in projectors:
        for value in projector.state_dict().values():
            digest.update(value.detach().cpu().numpy().tobytes())
    for example in examples:
        for take in example.takes:
            digest.update(feature_key(take))
        targets = (example.tokens, example.token_lengths, example.answers)
        digest.update(repr(targets).encode())
    return f"{digest.hexdigest()} {n_validation}"
