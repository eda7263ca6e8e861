"""Transformers' `from_pretrained` on a checked local folder, with one clear error if it fails."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tiny_align.export.model_folder import damaged, one_line
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# No code of a model's own, no network.
LOCAL = {"trust_remote_code": False, "local_files_only": True}


class Pretrained(Protocol):
    """One of transformers' classes that loads a folder."""

    def from_pretrained(self, pretrained_model_name_or_path: str, **options: Any) -> Any: ...


def load_pretrained(kind: Pretrained, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)` of a `model_folder`.

    Raises:
        TinyAlignError: a folder that is incomplete or damaged.
    """
    try:
        return kind.from_pretrained(str(folder), **LOCAL, **options)
    except pickle.UnpicklingError as error:
        why = (
            "its pytorch_model.bin is a pickle of more than tensors, whose code is never run, or "
            "damaged"
        )
        raise damaged(folder, why, "Give a checkpoint with model.safetensors") from error
    # transformers, safetensors and tokenizers raise all kinds, a bare Exception too.
    except Exception as error:
        raise damaged(folder, one_line(error)) from error


def load_config(folder: Path) -> "PreTrainedConfig":
    """The configuration of a `model_folder`; transformers chooses the attention, not the file.

    A file may name code of the hub, which transformers fetches if the package `kernels` is
    installed.
    """
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, folder)
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def load_whole(
    kind: Pretrained,
    folder: Path,
    needed: Callable[[str], bool] = lambda name: True,
    **options: Any,
) -> "PreTrainedModel":
    """`load_pretrained` for a model, of which no weight may be absent.

    Transformers would draw an absent one at random.

    Args:
        needed: whether the parameter of that name is used.
    Raises:
        TinyAlignError: as `load_pretrained`, or a tensor that the checkpoint lacks, has in another
            size or has too many, or one that holds NaN or infinity.
    """
    model, report = load_pretrained(
        kind,
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        weights_only=True,
        config=load_config(folder),
        **options,
    )
    for name, got, expected in sorted(report["mismatched_keys"]):
        raise TinyAlignError(
            f"{folder}: its {name} is {list(got)}, by its config.json it is {list(expected)}: "
            "weights and configuration belong to different models"
        )
    missing = sorted(filter(needed, report["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise TinyAlignError(f"{folder} lacks the weights of {missing[0]}{more}: download it again")
    unused = []
    for name in sorted(filter(needed, report["unexpected_keys"])):
        # A head beside the layers may be left out; older checkpoints keep the rotary frequencies.
        if "layers." in name and not name.endswith("inv_freq"):
            unused.append(name)
    if unused:
        raise TinyAlignError(
            f"{folder}: its {unused[0]} has no place in the {type(model).__name__} of its "
            "config.json: weights and configuration belong to different models"
        )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if needed(name)}
    refuse_not_finite(str(folder), tensors)
    return model.eval()


def build_whole(
    kind: type["PreTrainedModel"],
    config: "PreTrainedConfig",
    weights: dict[str, "torch.Tensor"],
    path: str,
) -> "PreTrainedModel":
    """A model in FP32 of weights that another format brings.

    Args:
        weights: all that a model of `kind` has; they are not copied.
        path: where they come from, for the error.
    Raises:
        TinyAlignError: one that holds NaN or infinity.
    """
    import torch

    refuse_not_finite(path, weights)
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.config.name_or_path = path
    return model.eval()


def refuse_not_finite(path: str, tensors: "dict[str, torch.Tensor]") -> None:
    """Refuse weights of which some value is NaN or infinite.

    Raises:
        TinyAlignError: there is one.
    """
    import torch

    broken = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            broken.append(name)
    if broken:
        first = tensors[broken[0]]
        count = int((~torch.isfinite(first)).sum())
        more = f", and so do {len(broken) - 1} more of its tensors" if broken[1:] else ""
        raise TinyAlignError(
            f"{path}: its {broken[0]} holds NaN or infinity ({count:,} of {first.numel():,} values)"
            f"{more}. Such a model computes nothing: download it again, or train it again"
        )


def _is_finite(tensor: "torch.Tensor") -> bool:
    """Whether every value is, without a copy of the tensor: minimum and maximum propagate NaN."""
    import torch

    if tensor.numel() == 0:
        return True
    extremes = torch.stack(torch.aminmax(tensor.float()))
    return bool(torch.isfinite(extremes).all())
