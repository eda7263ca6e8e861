"""A few other people's features, shipped with a bundle: a person's training goes over them too, and forgets nobody.

Rehearsal on old examples is the plainest cure of forgetting (Robins 1995, "Catastrophic Forgetting, Rehearsal and
Pseudorehearsal"). Sounds without a word are among them; a person's training makes more (personalise.py).
"""

import zlib
from pathlib import Path

import numpy as np

from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import array_of
from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import ARRAY_ERRORS


def write_rehearsal(path: Path, examples: list[Example]) -> None:
    """Features as float16, tokens (places in the bundle's speech vocabulary) and their lengths, of each recording."""
    features = [array_of(e.features) for e in examples]
    np.savez_compressed(
        path,
        features=np.concatenate(features).astype(np.float16),
        feature_ends=np.cumsum([len(f) for f in features]),
        tokens=np.array([t for e in examples for t in e.tokens], np.int32),
        token_lengths=np.array([n for e in examples for n in e.token_lengths], np.int32),
        token_ends=np.cumsum([len(e.tokens) for e in examples]),
    )


def read_rehearsal(path: Path) -> list[Example]:
    """The examples of `write_rehearsal`; none where a bundle has no such file.

    Raises:
        BundleError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        return _read(path)
    except (*ARRAY_ERRORS, OSError, KeyError, AttributeError, TypeError, zlib.error) as error:
        raise BundleError(
            f"{path} is damaged ({error}): copy the bundle again, or train its projector"
        ) from error


def _read(path: Path) -> list[Example]:
    with np.load(path, allow_pickle=False) as stored:
        features = np.split(stored["features"].astype(np.float32), stored["feature_ends"][:-1])
        ends = stored["token_ends"][:-1]
        tokens, lengths = (np.split(stored[name], ends) for name in ("tokens", "token_lengths"))
        return [Example(f, t.tolist(), n.tolist()) for f, t, n in zip(features, tokens, lengths)]
