"""Encoder features on disk, computed once by the runtime's own encoder backend: we train on what is deployed."""

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.datasets import Utterance
from tiny_align.align.vary import vary
from tiny_align.runtime.assistant import Assistant


def utterance_key(assistant: Assistant, utterance: Utterance) -> str:
    """Names an utterance's features: front end, encoder (graph and weights), the recording and its part of it."""
    digest = hashlib.sha256(assistant.bundle.manifest.encoder_key.encode())
    digest.update(utterance.audio.read_bytes())
    digest.update(f"{utterance.start_s} {utterance.end_s}".encode())
    return digest.hexdigest()[:32]


def cached_features(
    assistant: Assistant, utterances: list[Utterance], folder: Path, quiet: bool = False, *, variation: int = 0
) -> list:
    """(N, Da) float32 per utterance, read from `folder` or encoded and written there.

    Args:
        variation: 0 for the recordings as they are, k for the k-th variation of each (vary.py).
    Raises:
        AudioError: a recording that cannot be used, named in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = []
    for utterance in tqdm(utterances, desc="encode", unit="utt", disable=quiet, mininterval=0.5):
        key = utterance_key(assistant, utterance)
        path = folder / (f"{key}-{variation}.npy" if variation else f"{key}.npy")
        if not path.exists():
            made = _encode(assistant, utterance, np.random.default_rng([variation, int(key[:8], 16)]), variation > 0)
            np.save(path.with_suffix(".partial.npy"), made)
            path.with_suffix(".partial.npy").replace(path)
        features.append(np.load(path))
    return features


def _encode(assistant: Assistant, utterance: Utterance, rng: np.random.Generator, varied: bool) -> np.ndarray:
    audio = utterance.load(assistant.sample_rate)
    return assistant.features(vary(audio, assistant.sample_rate, rng) if varied else audio)
