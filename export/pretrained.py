"""Transformers' `from_pretrained` on a checked local folder, with one clear error for whatever is wrong with it."""

import pickle
from collections.abc import Callable
from pathlib import Path

from tiny_align.export.model_folder import damaged, one_line
from tiny_align.runtime.errors import TinyAlignError

LOCAL = {
    "trust_remote_code": False,
    "local_files_only": True,
}  # no code of a model's own, no network


def load_pretrained(kind, folder: Path, **options):
    """`kind.from_pretrained(folder, **options)` of a `model_folder`; `kind` is one of transformers' classes.

    Raises:
        TinyAlignError: a folder that is incomplete or damaged.
    """
    try:
        return kind.from_pretrained(str(folder), **LOCAL, **options)
    except pickle.UnpicklingError as error:
        why = "its pytorch_model.bin is a pickle of more than tensors, whose code is never run, or damaged"
        raise damaged(folder, why, "Give a checkpoint with model.safetensors") from error
    except (
        Exception
    ) as error:  # transformers, safetensors and tokenizers raise all kinds, a bare Exception too
        raise damaged(folder, one_line(error)) from error


def load_config(folder: Path):
    """The configuration of a `model_folder`; which attention is used is transformers' choice, not the file's.

    A file may name code of the hub, which transformers fetches where the package `kernels` is installed.
    """
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, folder)
    config._attn_implementation = config._experts_implementation = None
    return config


def load_whole(kind, folder: Path, needed: Callable[[str], bool] = lambda name: True, **options):
    """`load_pretrained` for weights, none of which may be absent: transformers would draw them at random.

    Args:
        needed: whether the parameter of that name is used.
    Raises:
        TinyAlignError: as `load_pretrained`, or a tensor that the checkpoint lacks, has in another size or has too
            many, or one that holds NaN or infinity.
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
    for name, given, expected in sorted(report["mismatched_keys"]):
        raise TinyAlignError(
            f"{folder}: its {name} is {list(given)}, by its config.json it is {list(expected)}: "
            "weights and configuration belong to different models"
        )
    if missing := sorted(name for name in report["missing_keys"] if needed(name)):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise TinyAlignError(f"{folder} lacks the weights of {missing[0]}{more}: download it again")
    # A head beside the layers may be left out; older checkpoints keep the rotary frequencies.
    of_layers = [
        n for n in report["unexpected_keys"] if "layers." in n and not n.endswith("inv_freq")
    ]
    if unused := sorted(filter(needed, of_layers)):
        raise TinyAlignError(
            f"{folder}: its {unused[0]} has no place in the {type(model).__name__} of its config.json: "
            "weights and configuration belong to different models"
        )
    refuse_not_finite(
        str(folder), {name: t for name, t in model.state_dict().items() if needed(name)}
    )
    return model.eval()


def refuse_not_finite(path: str, tensors: dict) -> None:
    """Refuse weights of which some value is NaN or infinite."""
    import torch

    broken = [name for name, t in tensors.items() if t.is_floating_point() and not _is_finite(t)]
    if broken:
        count = int((~torch.isfinite(tensors[broken[0]])).sum())
        more = f", and so do {len(broken) - 1} more of its tensors" if broken[1:] else ""
        raise TinyAlignError(
            f"{path}: its {broken[0]} holds NaN or infinity ({count:,} of {tensors[broken[0]].numel():,} values)"
            f"{more}. Such a model computes nothing: download it again, or train it again"
        )


def _is_finite(tensor) -> bool:
    """Without a copy of the tensor: NaN goes through a minimum and a maximum."""
    import torch

    return tensor.numel() == 0 or bool(
        torch.isfinite(torch.stack(torch.aminmax(tensor.float()))).all()
    )
