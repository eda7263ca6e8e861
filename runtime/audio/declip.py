"""Clipped speech repaired: the tops that an input stage cut off, drawn again as the sparsest spectrum that fits.

The method is A-SPADE (Kitic, Bertin, Gribonval 2015, "Sparsity and cosparsity for audio declipping: a flexible
non-convex approach", arXiv 1506.01830): a frame's coefficients are limited to a number that grows, while its reliable
samples stay as they are and its clipped ones stay beyond the ceiling. It costs about a quarter of the time that the
clipped speech lasts, on one core; speech that is not clipped costs a histogram. The limits are our choices.
"""

import numpy as np

FRAME, HOP = 768, 96  # samples
N_STEPS, MORE = 100, 2  # iterations, coefficients that each adds
AT_ONCE = 64  # frames, whose spectra a processor's cache holds
BINS = 100  # of amplitudes, from 0 to the greatest
FLAT, RIPPLED = (
    0.99,
    0.95,
)  # of the ceiling: resampling after the clipping has moved samples by more than rounding
MIN_SHARE = 1e-3  # of the samples lie at the ceiling
PILE = 2.0  # the ceiling's bins hold so many times more than those below it
WINDOW = np.sin(np.pi * (np.arange(FRAME) + 0.5) / FRAME).astype(np.float32) * np.float32(
    (2 * HOP / FRAME) ** 0.5
)


def clipping(audio: np.ndarray) -> tuple[float, float]:
    """(S,) -> the amplitudes from which positive and negative samples count as clipped; inf: none does."""
    return _ceiling(audio), _ceiling(-audio)


def declip(audio: np.ndarray) -> np.ndarray:
    """(S,) float32 in [-1, 1] -> (S,) float32 in [-1, 1]: as it was before it was clipped, but for its level.

    Audio that is not clipped is returned as it is.
    """
    above, below = clipping(audio)
    high, low = audio >= above, audio <= -below
    if not (high.any() or low.any()):
        return audio
    highs, lows = _frames(high), _frames(low)
    weighted = _frames(audio) * WINDOW
    damaged = np.flatnonzero((highs | lows).any(axis=1))
    for some in np.split(damaged, range(AT_ONCE, len(damaged), AT_ONCE)):
        least = np.where(highs[some], np.float32(above) * WINDOW, -np.inf)
        greatest = np.where(lows[some], np.float32(-below) * WINDOW, np.inf)
        weighted[some] = _restored(weighted[some], least, greatest, highs[some] | lows[some])
    restored = _overlapped(weighted * WINDOW, len(audio))
    return restored / max(1.0, float(np.abs(restored).max()))


def _ceiling(audio: np.ndarray) -> float:
    """Where positive amplitudes pile up, inf where they don't."""
    top = float(audio.max(initial=0.0))
    if top <= 0:
        return np.inf
    counts, edges = np.histogram(audio, BINS, (0.0, top))
    first = BINS * 3 // 4
    at = first + int(counts[first:].argmax())
    pile = counts[at - 1 : at + 2].sum() / 3
    below = counts[at - BINS // 5 : at - BINS // 15].mean()
    clipped = 3 * pile >= MIN_SHARE * len(audio) and pile > PILE * below
    ceiling = float(edges[at + 1])
    return ceiling * (FLAT if top < 1.01 * ceiling else RIPPLED) if clipped else np.inf


def _frames(array: np.ndarray) -> np.ndarray:
    """(S,) -> (N, FRAME): a frame every HOP samples, every sample in as many; zeros at both ends."""
    n = -(-(len(array) + FRAME - HOP) // HOP)
    padded = np.zeros((n - 1) * HOP + FRAME, array.dtype)
    padded[FRAME - HOP : FRAME - HOP + len(array)] = array
    return np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]


def _overlapped(frames: np.ndarray, n_samples: int) -> np.ndarray:
    """The inverse of `_frames` for frames that were weighted twice by WINDOW."""
    parts = frames.reshape(len(frames), FRAME // HOP, HOP)
    whole = np.zeros((len(frames) + FRAME // HOP - 1, HOP), np.float32)
    for i in range(FRAME // HOP):
        whole[i : i + len(frames)] += parts[:, i]
    return whole.reshape(-1)[FRAME - HOP : FRAME - HOP + n_samples]


def _restored(
    frames: np.ndarray, least: np.ndarray, greatest: np.ndarray, damaged: np.ndarray
) -> np.ndarray:
    """A-SPADE for frames (N, FRAME): the damaged samples anew, between `least` and `greatest`."""
    scale = np.float32(np.sqrt(2 * FRAME))
    audio, dual = frames, np.zeros((len(frames), FRAME + 1), np.complex64)
    spectrum = (np.fft.rfft(audio, 2 * FRAME) / scale).astype(np.complex64)
    for n_kept in range(MORE, MORE * (N_STEPS + 1), MORE):
        wanted = spectrum + dual
        size = np.abs(wanted)
        edge = np.partition(size, -n_kept, axis=1)[:, -n_kept, None]
        sparse = np.where(size >= edge, wanted, 0)
        near = np.fft.irfft((sparse - dual) * scale, 2 * FRAME)[:, :FRAME].astype(np.float32)
        audio = np.where(damaged, np.clip(near, least, greatest), frames)
        spectrum = (np.fft.rfft(audio, 2 * FRAME) / scale).astype(np.complex64)
        dual = dual + spectrum - sparse
    return audio
