"""Which moments of speech are long pauses: stretches without a sound, left out before windows are cut (windows.py).

Encoders are trained on speech with short pauses. Seconds of room noise beside the speech change what they make of the
words. So a long pause loses its middle, and the speech begins and ends soon before and after its sounds. Loudness alone
decides, against the quietest and the loudest moments of the last seconds: this is not a detector of speech
(endpoint.py), and a sound that may be speech stays. All limits are our choices.
"""

from dataclasses import dataclass, field

import numpy as np

FRAME_S = 0.005  # so that what is kept begins alike before the same word, wherever a stream began
LONG_S = 0.5  # a shorter pause between two sounds stays
KEPT_S, NOISY_KEPT_S = (
    0.08,
    0.3,
)  # of a pause, beside a sound; more where noise hides where a sound begins
NOISY_DB = 30.0  # between the floor and the loudest, or less
MEMORY_S = 4.0  # of levels: what is quiet and what is loud
FLOOR_SHARE = 0.05  # of the frames lie below the floor
ABOVE_FLOOR_DB = 6.0  # a frame above that is a sound,
BELOW_LOUDEST_DB = 40.0  # unless it is quieter than that,
AROUND_S, SOFT_DB = (
    0.1,
    20.0,
)  # or, softer than that below the loudest, as steady around it as only noise is
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

    def block_samples(self, n: int) -> int:
        """How many samples to judge at once, to get `n`: whole frames, and more than a long pause."""
        return max(-(-n // self.frame_samples), 2 * _frames(LONG_S)) * self.frame_samples

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
        is_sound, kept_frames = self._sounds(levels)
        keep = self._beside(is_sound, kept_frames)
        if last:
            rest = audio[frames.size :]  # less than a frame: goes with the one before it
            kept = [frames[keep].reshape(-1), rest if keep[-1:].all() else rest[:0]]
            return np.concatenate(kept), len(audio), self
        n_open = (
            int(np.argmax(keep[::-1])) if keep.any() else n_frames
        )  # at the end: a sound may follow
        n_judged = n_frames - min(n_open, _frames(LONG_S))
        sounds = np.flatnonzero(is_sound[:n_judged])
        since_sound = n_judged - 1 - int(sounds[-1]) if len(sounds) else self.since_sound + n_judged
        known = np.concatenate([self.levels, levels[:n_judged]])[-_frames(MEMORY_S) :]
        kept = frames[:n_judged][keep[:n_judged]].reshape(-1)
        return kept, n_judged * self.frame_samples, Pauses(self.sample_rate, known, since_sound)

    def _sounds(self, levels: np.ndarray) -> tuple[np.ndarray, int]:
        """(n,) dB -> (n,) bool, which frames hold a sound; and how many frames are kept beside one."""
        known = np.concatenate([self.levels, levels])
        if not len(known):
            return np.zeros(0, bool), 0
        loudest, floor = known.max(), np.quantile(known, FLOOR_SHARE)
        stands_out = known >= max(floor + ABOVE_FLOOR_DB, loudest - BELOW_LOUDEST_DB)
        is_steady = known < _lowest_around(known, _frames(AROUND_S)) + ABOVE_FLOOR_DB
        is_sound = stands_out & ~(is_steady & (known < loudest - SOFT_DB))
        is_noisy = loudest - floor < NOISY_DB
        return is_sound[len(self.levels) :], _frames(NOISY_KEPT_S if is_noisy else KEPT_S)

    def _beside(self, is_sound: np.ndarray, kept_frames: int) -> np.ndarray:
        """(n,) bool: a sound, close to one, or in a short pause between two."""
        place = np.arange(len(is_sound))
        before = place - np.maximum.accumulate(np.where(is_sound, place, -1 - self.since_sound))
        after = np.minimum.accumulate(np.where(is_sound, place, 2**31)[::-1])[::-1] - place
        return (np.minimum(before, after) <= kept_frames) | (before + after <= _frames(LONG_S))


def _frames(seconds: float) -> int:
    return round(seconds / FRAME_S)


def _lowest_around(levels: np.ndarray, n: int) -> np.ndarray:
    """(N,) -> (N,): the lowest of each level and its `n` neighbours on either side."""
    padded = np.pad(levels, n, constant_values=np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * n + 1).min(axis=1)
