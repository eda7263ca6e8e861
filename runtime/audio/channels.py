"""Several channels to one, in which a speaker on any of them is as clear as alone.

The plain mean fails if a channel is an inverted copy of another one (they cancel) or a delayed
copy (a comb filter).
"""

from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.audio.levels import frame_levels

MIN_OFFSET = 0.005  # a constant offset is removed from here on; speech has none
NOTED_OFFSET = 0.05  # and noted from here on
SILENT_DB = -40.0  # below the loudest channel, at its loudest moment
AS_LOUD_DB = 6.0
FRAME_MS = 25
MIN_CORRELATION = 0.5  # from which two channels have the same sound
MAX_DELAY_S = 0.5
BLOCK_S = 4.0  # over which channels are correlated; several times MAX_DELAY_S


def mix(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, list[str]]:
    """Average the channels that are neither silent nor an inverted or delayed copy.

    The loudest channel comes first. Copies that agree with it and speakers on channels of their
    own are mixed in.

    Args:
        samples: (S, C) float32.
        sample_rate: Hz.

    Returns:
        (S,) float32, and notes on what was done.
    """
    samples, notes = _remove_offset(samples)
    loudness_db = []
    for channel in samples.T:
        levels = frame_levels(channel, sample_rate, FRAME_MS)
        loudness_db.append(levels.max(initial=-np.inf))
    loudest, *others = np.argsort(np.negative(loudness_db), kind="stable").tolist()
    mixed = [loudest]
    left_out = {}  # channel -> why
    for i in others:
        if loudness_db[i] <= loudness_db[loudest] + SILENT_DB:
            left_out[i] = "it is silent"
            continue
        copy = _find_copy(samples, i, mixed, sample_rate)
        if copy is None:
            mixed.append(i)
        elif copy.delay < 0 and loudness_db[i] >= loudness_db[copy.original] - AS_LOUD_DB:
            # The original is late, and may lack the end: its earlier copy takes its place.
            mixed[mixed.index(copy.original)] = i
            late_copy = _Copy(i, copy.is_inverted, -copy.delay)
            left_out[copy.original] = late_copy.describe(sample_rate)
        else:
            left_out[i] = copy.describe(sample_rate)
    for i, reason in sorted(left_out.items()):
        notes.append(f"channel {i + 1} of {len(loudness_db)} is left out: {reason}")
    return samples[:, sorted(mixed)].mean(axis=1), notes


@dataclass(frozen=True)
class _Copy:
    """How a channel differs from another one with the same sound."""

    original: int  # the other channel
    is_inverted: bool
    delay: int  # samples after the other; negative: before it

    def describe(self, sample_rate: int) -> str:
        words = []
        if self.is_inverted:
            words.append("inverted")
        if self.delay:
            delay_ms = abs(self.delay) / sample_rate * 1000
            words.append(f"{delay_ms:.1f} ms {'late' if self.delay > 0 else 'early'}")
        return f"it is channel {self.original + 1}, {' and '.join(words)}"


def _remove_offset(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
    offsets = samples.mean(axis=0, dtype=np.float64)  # (C,)
    notes = []
    for offset in offsets:
        if abs(offset) >= NOTED_OFFSET:
            notes.append(f"a constant offset of {offset:.2f} is removed")
    offsets[np.abs(offsets) < MIN_OFFSET] = 0
    return samples - offsets.astype(np.float32), notes


def _find_copy(samples: np.ndarray, i: int, mixed: list[int], sample_rate: int) -> _Copy | None:
    """How channel `i` is an inverted or delayed copy of a mixed one; None: of none."""
    for other in mixed:
        if np.array_equal(samples[:, i], samples[:, other]):
            continue
        correlation = _correlate(samples[:, i], samples[:, other], sample_rate)  # (2 L + 1,)
        peak = int(np.argmax(np.abs(correlation)))
        is_inverted = bool(correlation[peak] < 0)
        delay = peak - len(correlation) // 2
        is_same_sound = abs(correlation[peak]) >= MIN_CORRELATION
        if is_same_sound and (is_inverted or delay):
            return _Copy(other, is_inverted, delay)
    return None


def _correlate(channel: np.ndarray, other: np.ndarray, sample_rate: int) -> np.ndarray:
    """Normalised correlation at delays of `channel` of -MAX_DELAY_S to MAX_DELAY_S, (2 L + 1,)."""
    max_delay = round(MAX_DELAY_S * sample_rate)
    block = round(BLOCK_S * sample_rate)
    size = 2 ** int(np.ceil(np.log2(block + max_delay)))
    spectrum = np.zeros(size // 2 + 1, np.complex128)
    for at in range(0, len(channel), block):
        channel_spectrum = np.fft.rfft(channel[at : at + block], size)
        other_spectrum = np.fft.rfft(other[at : at + block], size)
        spectrum += channel_spectrum * other_spectrum.conj()
    products = np.fft.irfft(spectrum, size)
    energy = np.sqrt(np.dot(channel, channel) * np.dot(other, other)) + 1e-12
    return np.concatenate([products[-max_delay:], products[: max_delay + 1]]) / energy
