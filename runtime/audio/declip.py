"""Repair clipped speech: replace the cut tops by the sparsest spectrum that fits.

The method is A-SPADE (Kitic, Bertin, Gribonval 2015, "Sparsity and cosparsity for audio
declipping: a flexible non-convex approach", arXiv 1506.01830). The number of a frame's
coefficients is limited, and the limit grows; reliable samples stay as they are, and clipped ones
stay beyond the ceiling. On one core it takes about a quarter of the duration of the clipped
speech; speech that is not clipped costs a histogram. The limits are our choices.
"""

import numpy as np

FRAME = 768  # samples
HOP = 96
N_STEPS = 100
COEFFICIENTS_PER_STEP = 2
BATCH_FRAMES = 64  # whose spectra fit into a processor's cache
BINS = 100  # of amplitudes, from 0 to the maximum
FLAT = 0.99  # of the ceiling: rounding moves samples by less
RIPPLED = 0.95  # of the ceiling, if the audio was resampled after it was clipped
MIN_SHARE = 1e-3  # of the samples lie at the ceiling
MIN_PILE_RATIO = 2.0  # of the counts of the ceiling's bins to those below
WINDOW = np.sin(np.pi * (np.arange(FRAME) + 0.5) / FRAME).astype(np.float32)
WINDOW *= np.float32((2 * HOP / FRAME) ** 0.5)


def clipping(audio: np.ndarray) -> tuple[float, float]:
    """(S,) -> the magnitudes from which positive and negative samples are clipped; inf: none."""
    return _ceiling(audio), _ceiling(-audio)


def declip(audio: np.ndarray) -> np.ndarray:
    """Restore clipped audio but for its level; return audio that is not clipped as it is.

    (S,) float32 in [-1, 1] -> (S,) float32 in [-1, 1].
    """
    above, below = clipping(audio)
    is_high = audio >= above
    is_low = audio <= -below
    if not (is_high.any() or is_low.any()):
        return audio
    high = _frames(is_high)
    low = _frames(is_low)
    weighted = _frames(audio) * WINDOW
    damaged = np.flatnonzero((high | low).any(axis=1))
    for batch in np.split(damaged, range(BATCH_FRAMES, len(damaged), BATCH_FRAMES)):
        min_values = np.where(high[batch], np.float32(above) * WINDOW, -np.inf)
        max_values = np.where(low[batch], np.float32(-below) * WINDOW, np.inf)
        is_clipped = high[batch] | low[batch]
        weighted[batch] = _restore(weighted[batch], min_values, max_values, is_clipped)
    restored = _overlap_add(weighted * WINDOW, len(audio))
    return restored / max(1.0, float(np.abs(restored).max()))


def _ceiling(audio: np.ndarray) -> float:
    """The level at which positive samples pile up; inf if they do not."""
    top = float(audio.max(initial=0.0))
    if top <= 0:
        return np.inf
    counts, edges = np.histogram(audio, BINS, (0.0, top))
    first = BINS * 3 // 4
    at = first + int(counts[first:].argmax())
    pile = counts[at - 1 : at + 2].sum() / 3
    below = counts[at - BINS // 5 : at - BINS // 15].mean()
    if 3 * pile < MIN_SHARE * len(audio) or pile <= MIN_PILE_RATIO * below:
        return np.inf
    ceiling = float(edges[at + 1])
    return ceiling * (FLAT if top < 1.01 * ceiling else RIPPLED)


def _frames(array: np.ndarray) -> np.ndarray:
    """(S,) -> (N, FRAME): every HOP samples, each sample in equally many; zeros at both ends."""
    n_frames = -(-(len(array) + FRAME - HOP) // HOP)
    padded = np.zeros((n_frames - 1) * HOP + FRAME, array.dtype)
    padded[FRAME - HOP : FRAME - HOP + len(array)] = array
    return np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]


def _overlap_add(frames: np.ndarray, n_samples: int) -> np.ndarray:
    """The inverse of `_frames` for frames that were weighted twice by WINDOW."""
    n_parts = FRAME // HOP
    parts = frames.reshape(len(frames), n_parts, HOP)
    whole = np.zeros((len(frames) + n_parts - 1, HOP), np.float32)
    for i in range(n_parts):
        whole[i : i + len(frames)] += parts[:, i]
    return whole.reshape(-1)[FRAME - HOP : FRAME - HOP + n_samples]


def _restore(
    frames: np.ndarray, min_values: np.ndarray, max_values: np.ndarray, is_clipped: np.ndarray
) -> np.ndarray:
    """A-SPADE for frames (N, FRAME): replace clipped samples between `min_` and `max_values`."""
    scale = np.float32(np.sqrt(2 * FRAME))
    audio = frames
    dual = np.zeros((len(frames), FRAME + 1), np.complex64)
    spectrum = (np.fft.rfft(audio, 2 * FRAME) / scale).astype(np.complex64)
    for step in range(1, N_STEPS + 1):
        n_coefficients = step * COEFFICIENTS_PER_STEP
        target = spectrum + dual
        magnitude = np.abs(target)
        threshold = np.partition(magnitude, -n_coefficients, axis=1)[:, -n_coefficients, None]
        sparse = np.where(magnitude >= threshold, target, 0)
        estimate = np.fft.irfft((sparse - dual) * scale, 2 * FRAME)[:, :FRAME].astype(np.float32)
        audio = np.where(is_clipped, np.clip(estimate, min_values, max_values), frames)
        spectrum = (np.fft.rfft(audio, 2 * FRAME) / scale).astype(np.complex64)
        dual = dual + spectrum - sparse
    return audio
