"""Arrays and sizes to a checkpoint folder as transformers' own `save_pretrained` writes it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS = "model.safetensors"


def write_model(
    folder: Path,
    kind: type["PreTrainedModel"],
    config: "PreTrainedConfig",
    weights: dict[str, np.ndarray],
) -> None:
    """Write config.json and model.safetensors; a tied output layer is not stored.

    Args:
        weights: float arrays of one type; all that a model of `kind` has, and no others.
    Raises:
        TinyAlignError: a weight is absent, unknown or of another shape.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = kind(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    got = {name: array.shape for name, array in weights.items()}
    differing = sorted(set(expected.items()) ^ set(got.items()))
    if differing:
        name = differing[0][0]
        raise TinyAlignError(
            f"{name} in the source of {folder.name}: expected {expected.get(name, 'none')}, "
            f"got {got.get(name, 'none')}. This version of transformers builds another model: "
            "install the one in setup.py"
        )
    tensors = {}
    for name, array in weights.items():
        tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
    config.architectures = [kind.__name__]
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(folder)
    try:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # of a full disk, in some versions
        raise OSError(f"{WEIGHTS}: {error}") from error
    (folder / WEIGHTS).chmod(0o644)


def write_generation_config(folder: Path, **settings: Any) -> None:
    """Write generation_config.json: how transformers' `generate` uses the model."""
    from transformers import GenerationConfig

    GenerationConfig(**settings).save_pretrained(folder)


def write_tokenizer(folder: Path, tokenizer: "Tokenizer", **settings: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        settings: names of special tokens (`bos_token`, ...), `chat_template`, `model_max_length`.
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
