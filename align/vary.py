"""A recording said a little differently: faster or slower, by a longer or shorter throat.

A person records a hundred sentences; the projector is trained on a few variations of each as well. They are made on
the log-mel spectrogram, before the encoder. Ranges are our choices.
"""

import numpy as np

SPEED = (0.85, 1.18)
TRACT = (0.94, 1.06)


def vary(log_mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(frames, M) un-normalised log-mel -> another (frames', M) of the same words."""
    n_frames, n_mels = log_mel.shape
    times = np.arange(0, n_frames - 1, rng.uniform(*SPEED))
    bands = np.minimum(np.arange(n_mels) * rng.uniform(*TRACT), n_mels - 1)
    return _between(_between(log_mel, times).T, bands).T.astype(np.float32)


def _between(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows read at fractional places, linearly interpolated."""
    low = np.minimum(places.astype(int), len(rows) - 2)
    share = (places - low)[:, None]
    return rows[low] * (1 - share) + rows[low + 1] * share
