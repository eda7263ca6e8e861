"""Several channels -> one in which whoever speaks on any of them is heard as if alone.

The plain mean is wrong where a channel is another one upside down (it cancels) or late (it makes a comb filter).
"""

from dataclasses import dataclass, replace

import numpy as np

from tiny_align.runtime.audio.levels import frame_levels

OFFSET = 0.005  # a constant that is taken off; speech has none
NAMED_OFFSET = 0.05  # and one that is worth a word
SILENT_DB = -40.0  # below the loudest channel, at its loudest moment
AS_LOUD_DB = 6.0
FRAME_MS = 25
SAME = 0.5  # correlation from which two channels are one sound
MAX_DELAY_S = 0.5
BLOCK_S = 4.0  # over which channels are correlated; several times MAX_DELAY_S


def mix(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, list[str]]:
    """(S, C) float32 -> (S,), and what was done that is worth a word.

    From the loudest channel on, a channel counts if it is not silent and is no inverted or delayed copy of one that
    counts: copies that agree and people on channels of their own do. What counts is averaged.
    """
    samples, notes = _without_offset(samples)
    loudness = [
        frame_levels(channel, sample_rate, FRAME_MS).max(initial=-np.inf) for channel in samples.T
    ]
    first, *others = np.argsort(np.negative(loudness), kind="stable").tolist()
    kept, left_out = [first], {}
    for i in others:
        if loudness[i] <= loudness[first] + SILENT_DB:
            left_out[i] = "it is silent"
            continue
        copies = ((k, _bad_copy(samples[:, i], samples[:, k], sample_rate)) for k in kept)
        k, copy = next((pair for pair in copies if pair[1]), (i, None))
        if copy is None:
            kept.append(i)
        elif (
            copy.delay < 0 and loudness[i] >= loudness[k] - AS_LOUD_DB
        ):  # the late one may lack the end
            kept[kept.index(k)] = i
            left_out[k] = replace(copy, delay=-copy.delay).described(i, sample_rate)
        else:
            left_out[i] = copy.described(k, sample_rate)
    notes += [
        f"channel {i + 1} of {len(loudness)} is left out: {why}"
        for i, why in sorted(left_out.items())
    ]
    return samples[:, sorted(kept)].mean(axis=1), notes


@dataclass(frozen=True)
class _Copy:
    """What is wrong with a channel that has the same sound as another."""

    inverted: bool
    delay: int  # samples after the other; negative: before it

    def described(self, other: int, sample_rate: int) -> str:
        size = f"{abs(self.delay) / sample_rate * 1000:.1f} ms"
        words = ["inverted"] if self.inverted else []
        words += [f"{size} {'late' if self.delay > 0 else 'early'}"] if self.delay else []
        return f"it is channel {other + 1}, {' and '.join(words)}"


def _without_offset(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
    offsets = samples.mean(axis=0, dtype=np.float64)
    notes = [
        f"a constant offset of {offset:.2f} is taken off"
        for offset in offsets
        if abs(offset) >= NAMED_OFFSET
    ]
    offsets[np.abs(offsets) < OFFSET] = 0
    return samples - offsets.astype(np.float32), notes


def _bad_copy(channel: np.ndarray, other: np.ndarray, sample_rate: int) -> _Copy | None:
    """Whether a channel has the same sound as another and does not agree with it."""
    if np.array_equal(channel, other):
        return None
    correlation = _correlation(
        channel, other, sample_rate
    )  # (2 L + 1,), the middle one without a delay
    best = int(np.argmax(np.abs(correlation)))
    copy = _Copy(bool(correlation[best] < 0), best - len(correlation) // 2)
    is_same = abs(correlation[best]) >= SAME
    return copy if is_same and (copy.inverted or copy.delay) else None


def _correlation(channel: np.ndarray, other: np.ndarray, sample_rate: int) -> np.ndarray:
    """Normalised correlation at delays of the first of -MAX_DELAY_S to MAX_DELAY_S."""
    reach, block = round(MAX_DELAY_S * sample_rate), round(BLOCK_S * sample_rate)
    size = 2 ** int(np.ceil(np.log2(block + reach)))
    spectrum = np.zeros(size // 2 + 1, np.complex128)
    for at in range(0, len(channel), block):
        one, two = (np.fft.rfft(sound[at : at + block], size) for sound in (channel, other))
        spectrum += one * two.conj()
    products = np.fft.irfft(spectrum, size)
    energy = np.sqrt(np.dot(channel, channel) * np.dot(other, other)) + 1e-12
    return np.concatenate([products[-reach:], products[: reach + 1]]) / energy
