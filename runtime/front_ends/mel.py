"""Mel filters and frames, shared by the log-mel front ends. The front ends are in nemo.py and beside it."""

from functools import lru_cache

import numpy as np


@lru_cache
def slaney_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """(n_fft // 2 + 1, n_mels) float64: triangles of equal area in Hz, from 0 Hz up, on Slaney's scale."""
    top = _hz_to_slaney(np.array(sample_rate / 2))
    edges = _slaney_to_hz(np.linspace(0, top, n_mels + 2))  # (n_mels + 2,)
    return (
        _triangles(np.linspace(0, sample_rate / 2, n_fft // 2 + 1), edges)
        * 2
        / (edges[2:] - edges[:-2])
    )


@lru_cache
def kaldi_filters(sample_rate: int, n_fft: int, n_mels: int, min_hz: float) -> np.ndarray:
    """(n_fft // 2 + 1, n_mels) float64: triangles of height one in mel, from `min_hz` up, on Kaldi's scale."""
    edges = np.linspace(_hz_to_kaldi(min_hz), _hz_to_kaldi(sample_rate / 2), n_mels + 2)
    return _triangles(_hz_to_kaldi(np.linspace(0, sample_rate / 2, n_fft // 2 + 1)), edges)


def cut(audio: np.ndarray, length: int, hop: int, n_frames: int) -> np.ndarray:
    """(S,) -> at most (n_frames, length): a view of every `hop`-th window."""
    return np.lib.stride_tricks.sliding_window_view(audio, length)[::hop][:n_frames]


def _triangles(bins: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(n_bins,) and (n_mels + 2,) on one scale -> (n_bins, n_mels)."""
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def _hz_to_slaney(hz: np.ndarray) -> np.ndarray:
    """Linear below 1 kHz, logarithmic above."""
    return np.where(
        hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4)
    )


def _slaney_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))


def _hz_to_kaldi(hz):
    return 1127 * np.log(1 + hz / 700)
