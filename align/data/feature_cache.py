"""Encoder features on disk, computed once by the runtime's own encoder backend: we train on what is deployed.

One .npy file per recording, which appears whole: an encoding that was killed goes on with the next one. A person's
features are read into memory; those of a large data set stay where they are (`Stored`).
"""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.augment import augment
from tiny_align.align.data.datasets import Utterance
from tiny_align.align.data.non_speech import non_speech
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.files import ARRAY_ERRORS, written_file

log = logging.getLogger(__name__)

FORM = (
    2  # of what is made of a recording before the encoder: features of another form are made again
)


@dataclass(frozen=True)
class Stored:
    """(N, Da) float32 in a .npy file. Files whose name is the same hold the same features."""

    path: Path


def array_of(features: np.ndarray | Stored) -> np.ndarray:
    """(N, Da) float32; stored ones are mapped into memory for as long as somebody holds the array."""
    if isinstance(features, Stored):
        # as if writable: torch warns of arrays that are not
        return np.load(features.path, mmap_mode="c", allow_pickle=False)
    return features


def kept(path: Path, make: Callable[[], np.ndarray]) -> Path:
    """The .npy file `path`, made and written unless it is there; one that is cut off or no array is made again.

    Raises:
        TinyAlignError: it cannot be written.
    """
    if not path.exists() or not _is_whole(path):
        array = make()
        with written_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is an array as long as its header says, as far as that is known without reading it."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False).shape  # noqa: B018 - an archive has none
    except (*ARRAY_ERRORS, OSError, AttributeError) as error:
        log.warning("%s is damaged (%s): it is made again", path, error)
        return False
    return True


def utterance_key(assistant: Assistant, utterance: Utterance) -> str:
    """Names an utterance's features: front end, encoder (graph and weights), the recording and its part of it."""
    digest = hashlib.sha256(assistant.bundle.manifest.encoder_key.encode())
    digest.update(utterance.audio.read_bytes())
    digest.update(f"{utterance.start_s} {utterance.end_s} {FORM}".encode())
    return digest.hexdigest()[:32]


def cached_features(
    assistant: Assistant,
    utterances: list[Utterance],
    folder: Path,
    quiet: bool = False,
    *,
    augmentation: int = 0,
) -> list:
    """(N, Da) float32 per utterance, read from `folder` or encoded and written there.

    Args:
        augmentation: 0 for the recordings as they are, k for the k-th augmentation of each (augment.py).
    Raises:
        AudioError: a recording that cannot be used, named in the message.
    """
    shown = tqdm(utterances, desc="encode", unit="utt", disable=quiet, mininterval=0.5)
    return [
        np.load(cached_file(assistant, u, folder, augmentation=augmentation), allow_pickle=False)
        for u in shown
    ]


def cached_file(
    assistant: Assistant, utterance: Utterance, folder: Path, *, augmentation: int = 0
) -> Path:
    """Where in `folder` an utterance's features lie, encoded and written there unless they are."""
    key = utterance_key(assistant, utterance)
    rng = np.random.default_rng([augmentation, int(key[:8], 16)])
    path = folder / (f"{key}-{augmentation}.npy" if augmentation else f"{key}.npy")
    return kept(path, lambda: _encode(assistant, utterance, rng, augmentation > 0))


def _encode(
    assistant: Assistant, utterance: Utterance, rng: np.random.Generator, varied: bool
) -> np.ndarray:
    audio = utterance.load(assistant.sample_rate)
    return assistant.features(augment(audio, assistant.sample_rate, rng) if varied else audio)


def non_speech_files(assistant: Assistant, n: int, seed: int, folder: Path) -> list[Path]:
    """Where in `folder` the features of `n` sounds without a word lie, encoded and written there unless they are."""
    return list(itertools.islice(_wordless_files(assistant, seed, folder), n))


def _wordless_files(assistant: Assistant, seed: int, folder: Path) -> Iterator[Path]:
    def features(i: int) -> np.ndarray:
        return assistant.features(
            non_speech(np.random.default_rng([seed, i]), assistant.sample_rate)
        )

    name = f"nothing-{assistant.bundle.manifest.encoder_key[:16]}-{seed}"
    for i in itertools.count():
        with contextlib.suppress(AudioError):  # a knock may be too short to be looked at
            yield kept(folder / f"{name}-{i}.npy", partial(features, i))
