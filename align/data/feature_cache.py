"""Encoder features on disk, computed once.

The runtime's own encoder backend computes them: we train on what is deployed.

One .npy file per recording, which is written whole or not at all: an interrupted encoding continues
with the next file. A user's features are read into memory; those of a large data set stay on disk
(`Stored`).
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.augment import augment
from tiny_align.align.data.non_speech import non_speech
from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.files import ARRAY_ERRORS, written_file

log = logging.getLogger(__name__)

FORM = 2  # part of every key: a new number where the encoder's input is made in another way


@dataclass(frozen=True)
class Stored:
    """Features (N, Da) float32 in a .npy file. Files of the same name hold the same features."""

    path: Path


def array_of(features: np.ndarray | Stored) -> np.ndarray:
    """(N, Da) float32; stored features are mapped into memory while the array is in use."""
    if isinstance(features, Stored):
        # "c": the array counts as writable, torch warns of others
        return np.load(features.path, mmap_mode="c", allow_pickle=False)
    return features


def ensure_array(path: Path, compute: Callable[[], np.ndarray]) -> Path:
    """Compute and write the .npy file `path`, unless it is there and whole; returns `path`.

    Raises:
        TinyAlignError: it cannot be written.
    """
    if not path.exists() or not _is_whole(path):
        array = compute()
        with written_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is an array and as long as its header says; the values are not read."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False).shape  # noqa: B018 - an archive has none
    except (*ARRAY_ERRORS, OSError, AttributeError) as error:
        log.warning("%s is damaged (%s): it is made again", path, error)
        return False
    return True


def utterance_key(assistant: Assistant, utterance: Utterance) -> str:
    """Name an utterance's features by front end, encoder (graph and weights), file and segment."""
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
) -> list[np.ndarray]:
    """(N, Da) float32 per utterance, read from `folder` or encoded and written there.

    Args:
        augmentation: 0: the recordings as they are; k: the k-th augmentation of each (augment.py).

    Raises:
        AudioError: a recording that cannot be used, named in the message.
    """
    features = []
    for utterance in tqdm(utterances, desc="encode", unit="utt", disable=quiet, mininterval=0.5):
        file = cached_file(assistant, utterance, folder, augmentation=augmentation)
        features.append(np.load(file, allow_pickle=False))
    return features


def cached_file(
    assistant: Assistant, utterance: Utterance, folder: Path, *, augmentation: int = 0
) -> Path:
    """The file of an utterance's features in `folder`, encoded and written unless it is there."""
    key = utterance_key(assistant, utterance)
    name = f"{key}-{augmentation}.npy" if augmentation else f"{key}.npy"

    def encode() -> np.ndarray:
        audio = utterance.load(assistant.sample_rate)
        if augmentation:
            rng = np.random.default_rng([augmentation, int(key[:8], 16)])
            audio = augment(audio, assistant.sample_rate, rng)
        return assistant.features(audio)

    return ensure_array(folder / name, encode)


def non_speech_files(assistant: Assistant, n: int, seed: int, folder: Path) -> list[Path]:
    """The files of the features of `n` non-speech sounds in `folder`.

    What is not there is encoded and written. A sound may be too short for the encoder (a knock):
    the next one takes its place.
    """
    prefix = f"nothing-{assistant.bundle.manifest.encoder_key[:16]}-{seed}"
    files: list[Path] = []
    i = 0
    while len(files) < n:
        with contextlib.suppress(AudioError):
            file = folder / f"{prefix}-{i}.npy"
            files.append(ensure_array(file, partial(_encode_sound, assistant, seed, i)))
        i += 1
    return files


def _encode_sound(assistant: Assistant, seed: int, i: int) -> np.ndarray:
    sound = non_speech(np.random.default_rng([seed, i]), assistant.sample_rate)
    return assistant.features(sound)
