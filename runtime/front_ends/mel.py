"""Mel filters and frames, shared by the log-mel front ends (nemo.py, whisper.py, seamless.py)."""

from functools import lru_cache

import numpy as np


@lru_cache
def slaney_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """(n_fft // 2 + 1, n_mels) float64: triangles of equal area from 0 Hz up, Slaney's scale."""
    top = hz_to_slaney(np.array(sample_rate / 2))
    edges = slaney_to_hz(np.linspace(0, top, n_mels + 2))  # (n_mels + 2,) Hz
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    return _triangles(bins, edges) * 2 / (edges[2:] - edges[:-2])


@lru_cache
def kaldi_filters(sample_rate: int, n_fft: int, n_mels: int, min_hz: float) -> np.ndarray:
    """(n_fft // 2 + 1, n_mels) float64: triangles of height one from `min_hz` up, Kaldi's scale."""
    edges = np.linspace(hz_to_kaldi(min_hz), hz_to_kaldi(sample_rate / 2), n_mels + 2)
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    return _triangles(hz_to_kaldi(bins), edges)


def cut(audio: np.ndarray, length: int, hop: int, n_frames: int) -> np.ndarray:
    """(S,) -> at most (n_frames, length): a view of every `hop`-th window."""
    return np.lib.stride_tricks.sliding_window_view(audio, length)[::hop][:n_frames]


def _triangles(bins: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n_bins,) and (n_mels + 2,) on one scale -> (n_bins, n_mels)."""
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def hz_to_slaney(hz: np.ndarray) -> np.ndarray:
    """Linear below 1 kHz, logarithmic above."""
    logarithmic = 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4)
    return np.where(hz < 1000, hz * 3 / 200, logarithmic)


def slaney_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))


def hz_to_kaldi(hz: np.ndarray | float) -> np.ndarray:
    return 1127 * np.log(1 + hz / 700)
