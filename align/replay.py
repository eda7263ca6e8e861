"""A few other people's features, shipped with a bundle: a person's training goes over them too, and forgets nobody.

Rehearsal on old examples is the plainest cure of forgetting (Robins 1995, "Catastrophic Forgetting, Rehearsal and
Pseudorehearsal"). Sounds without a word are among them, so that no device has to make them.
"""

from pathlib import Path

import numpy as np

from tiny_align.align.train import Example


def write_replay(path: Path, examples: list[Example]) -> None:
    """Features as float16 and tokens, of each example's recording as it is; one .npz file."""
    features, tokens = [e.features.astype(np.float16) for e in examples], [e.tokens for e in examples]
    np.savez_compressed(
        path,
        features=np.concatenate(features),
        feature_ends=np.cumsum([len(f) for f in features]),
        tokens=np.concatenate([np.array(t, np.int32) for t in tokens]),
        token_ends=np.cumsum([len(t) for t in tokens]),
    )


def read_replay(path: Path) -> list[Example]:
    """The examples of `write_replay`; none where a bundle has no such file."""
    if not path.exists():
        return []
    stored = np.load(path)
    features = np.split(stored["features"].astype(np.float32), stored["feature_ends"][:-1])
    tokens = np.split(stored["tokens"], stored["token_ends"][:-1])
    return [Example(f, t.tolist(), []) for f, t in zip(features, tokens)]
