"""Rehearsal data: other speakers' features that a user's training repeats to forget nothing.

Rehearsal on old examples is the simplest remedy against forgetting (Robins 1995, "Catastrophic
Forgetting, Rehearsal and Pseudorehearsal"). A bundle ships some, non-speech among them; a user's
training adds more non-speech of its own.
"""

import zlib
from pathlib import Path

import numpy as np

from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import array_of, non_speech_files
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import ARRAY_ERRORS

N_NON_SPEECH = 128  # sounds beside the bundle's
NON_SPEECH_SEED = 1  # the bundle's are of the general training's seed, 0


def rehearsal_examples(assistant: Assistant, objective: str, folder: Path) -> list[Example]:
    """What a user's training repeats: the bundle's rehearsal data and, for "ctc", more non-speech.

    Args:
        folder: for the features of the non-speech.
    """
    shipped = read_rehearsal(assistant.bundle.replay)
    if objective != "ctc":  # a projector that pools gives soft tokens for any sound
        return [example for example in shipped if example.tokens]
    files = non_speech_files(assistant, N_NON_SPEECH, NON_SPEECH_SEED, folder)
    return shipped + [Example(np.load(file, allow_pickle=False), [], []) for file in files]


def write_rehearsal(path: Path, examples: list[Example]) -> None:
    """Write features as float16, tokens and their lengths.

    The tokens are places in the bundle's speech vocabulary.
    """
    features = [array_of(example.features) for example in examples]
    tokens: list[int] = []
    token_lengths: list[int] = []
    for example in examples:
        tokens += example.tokens
        token_lengths += example.token_lengths
    np.savez_compressed(
        path,
        features=np.concatenate(features).astype(np.float16),
        feature_ends=np.cumsum([len(f) for f in features]),
        tokens=np.array(tokens, np.int32),
        token_lengths=np.array(token_lengths, np.int32),
        token_ends=np.cumsum([len(example.tokens) for example in examples]),
    )


def read_rehearsal(path: Path) -> list[Example]:
    """Read the examples of `write_rehearsal`; none if the bundle has no such file.

    Raises:
        BundleError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as stored:
            features = stored["features"].astype(np.float32)
            features = np.split(features, stored["feature_ends"][:-1])
            token_ends = stored["token_ends"][:-1]
            tokens = np.split(stored["tokens"], token_ends)
            token_lengths = np.split(stored["token_lengths"], token_ends)
    except (*ARRAY_ERRORS, OSError, KeyError, AttributeError, TypeError, zlib.error) as error:
        raise BundleError(
            f"{path} is damaged ({error}): copy the bundle again, or train its projector"
        ) from error
    rows = zip(features, tokens, token_lengths)
    return [Example(f, t.tolist(), lengths.tolist()) for f, t, lengths in rows]
