"""Transformers' `from_pretrained`, with one clear error for whatever is wrong with a folder or hub id."""

from collections.abc import Callable
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError


def load_pretrained(kind, path: str, **options):
    """`kind.from_pretrained(path, **options)`; `kind` is one of transformers' Auto classes.

    Raises:
        TinyAlignError: no such folder or hub id, or one that is incomplete or damaged.
    """
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():  # no hub id looks so
        raise TinyAlignError(f"there is no model folder {path}: give one, or a hub id (ORGANISATION/NAME)")
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # transformers, safetensors and tokenizers raise all kinds, a bare Exception too
        said = " ".join(str(error).split()).rstrip(".")
        raise TinyAlignError(
            f"{path} cannot be loaded as a model folder or hub id ({said}): download it again, or give another"
        ) from error


def load_whole(kind, path: str, needed: Callable[[str], bool] = lambda name: True, **options):
    """`load_pretrained` for weights, none of which may be absent: transformers would draw them at random.

    Args:
        needed: whether the parameter of that name is used.
    Raises:
        TinyAlignError: as `load_pretrained`, or a tensor that the checkpoint lacks or has in another size.
    """
    model, report = load_pretrained(kind, path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for name, given, expected in sorted(report["mismatched_keys"]):
        raise TinyAlignError(
            f"{path}: its {name} is {list(given)}, by its config.json it is {list(expected)}: "
            "weights and configuration belong to different models"
        )
    if missing := sorted(name for name in report["missing_keys"] if needed(name)):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise TinyAlignError(f"{path} lacks the weights of {missing[0]}{more}: download it again")
    return model.eval()
