"""Which moments of speech are long pauses: a stretch without a sound, left out before windows are cut (windows.py).

Encoders are trained on speech with short pauses. Seconds of room noise beside the speech change what they make of the
words, so that of a long pause only the beginning and the end are kept. Loudness alone decides, against the quietest
and the loudest moments of the last seconds: this is not a detector of speech (endpoint.py), and a sound that may be
speech stays. Where all is about equally loud, nothing tells a voice from noise. All limits are our choices.
"""

from dataclasses import dataclass, field

import numpy as np

FRAME_S = 0.02
KEPT_S = 0.2  # of a pause, after the last sound before it and before the first one after it
MEMORY_S = 4.0  # of levels: what is quiet and what is loud
FLOOR_SHARE = 0.05  # of the frames lie below the floor
LOUD_SHARE = 0.2  # of the range from the floor to the loudest: a frame above is a sound
LEAST_RANGE_DB = 6.0  # above the floor, at least
GREATEST_RANGE_DB = 60.0  # below the loudest: digital silence is not the floor
AROUND_S = 0.1  # in which a voice rises and falls by more than LEAST_RANGE_DB; noise is steady
SOFT_DB = 20.0  # below the loudest: a steady sound louder than that may be a long vowel
SILENCE = 1e-12  # power, so that digital silence has a level


@dataclass(frozen=True)
class Pauses:
    """What is known of an utterance so far: an immutable value, of which `judge` gives the next."""

    sample_rate: int  # Hz
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) dB of the last frames
    since_sound: int = 2**31  # frames since the last sound

    @property
    def frame_samples(self) -> int:
        return round(FRAME_S * self.sample_rate)

    @property
    def kept_frames(self) -> int:
        return round(KEPT_S / FRAME_S)

    def block_samples(self, n: int) -> int:
        """How many samples to judge at once, to get `n`: whole frames, and more than are kept of a pause."""
        return max(-(-n // self.frame_samples), 2 * self.kept_frames) * self.frame_samples

    def judge(self, audio: np.ndarray, last: bool) -> tuple[np.ndarray, int, "Pauses"]:
        """Leave the pauses out of audio that follows what was judged before.

        Args:
            audio: (S,) float32. Unless it is the last, whole frames.
            last: whether the utterance ends here. If not, a pause at the end is judged again with what follows.
        Returns:
            What is kept (S',), the number of samples judged, and what is known then.
        """
        n_frames = len(audio) // self.frame_samples
        frames = audio[: n_frames * self.frame_samples].reshape(n_frames, self.frame_samples)
        levels = 10 * np.log10(frames.var(axis=1) + SILENCE)  # a constant offset is not sound
        loud = self._loud(levels)
        keep = self._near(loud)
        if last:
            rest = audio[frames.size :]  # less than a frame: goes with the one before it
            kept = [frames[keep].reshape(-1), rest if keep[-1:].all() else rest[:0]]
            return np.concatenate(kept), len(audio), self
        n_open = int(np.argmax(keep[::-1])) if keep.any() else n_frames  # at the end: a sound may follow
        n_judged = n_frames - min(n_open, self.kept_frames)
        sounds = np.flatnonzero(loud[:n_judged])
        since_sound = n_judged - 1 - int(sounds[-1]) if len(sounds) else self.since_sound + n_judged
        known = np.concatenate([self.levels, levels[:n_judged]])[-round(MEMORY_S / FRAME_S) :]
        kept = frames[:n_judged][keep[:n_judged]].reshape(-1)
        return kept, n_judged * self.frame_samples, Pauses(self.sample_rate, known, since_sound)

    def _loud(self, levels: np.ndarray) -> np.ndarray:
        """(n,) dB -> (n,) bool: which frames hold a sound."""
        known = np.concatenate([self.levels, levels])
        if not len(known):
            return np.zeros(0, bool)
        loudest = known.max()
        floor = max(np.quantile(known, FLOOR_SHARE), loudest - GREATEST_RANGE_DB)
        stands_out = known >= floor + max(LEAST_RANGE_DB, LOUD_SHARE * (loudest - floor))
        steady = known < _lowest_around(known, round(AROUND_S / FRAME_S)) + LEAST_RANGE_DB
        return (stands_out & ~(steady & (known < loudest - SOFT_DB)))[len(self.levels) :]

    def _near(self, loud: np.ndarray) -> np.ndarray:
        """(n,) bool: at most `kept_frames` before or after a sound."""
        place = np.arange(len(loud))
        before = np.maximum.accumulate(np.where(loud, place, -1 - self.since_sound))
        after = np.minimum.accumulate(np.where(loud, place, 2**31)[::-1])[::-1]
        return (place - before <= self.kept_frames) | (after - place <= self.kept_frames)


def _lowest_around(levels: np.ndarray, n: int) -> np.ndarray:
    """(N,) -> (N,): the lowest of each level and its `n` neighbours on either side."""
    padded = np.pad(levels, n, constant_values=np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * n + 1).min(axis=1)
