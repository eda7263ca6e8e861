"""Leave long pauses out of speech before windows are cut (windows.py).

Encoders are trained on speech with short pauses, and seconds of room noise beside the speech change
what they make of the words. So a long pause loses its middle, and speech begins and ends close to
its first and last sound. Only loudness counts, against the quietest and the loudest moments of the
last seconds: this is no speech detector (endpoint.py), and a sound that may be speech stays. All
limits are our choices.
"""

from dataclasses import dataclass, field

import numpy as np

FRAME_S = 0.005  # short: the cut before a word is the same wherever the stream began
LONG_S = 0.5  # a shorter pause between two sounds stays
PAD_S = 0.08  # of a pause that stay beside a sound
NOISY_PAD_S = 0.3  # the same in noise, which hides where a sound begins
NOISY_DB = 30.0  # between the floor and the loudest frame, or less
MEMORY_S = 4.0  # of levels, from which the floor and the loudest frame are taken
FLOOR_SHARE = 0.05  # of the frames lie below the floor
# A frame is a sound if it is this far above the floor and not this far below the loudest frame.
ABOVE_FLOOR_DB = 6.0
BELOW_LOUDEST_DB = 40.0
# It is noise if it is this far below the loudest frame and, this far around it, steady.
SOFT_DB = 20.0
AROUND_S = 0.1
SILENCE = 1e-12  # power, so that digital silence has a level
FAR_FRAMES = 2**31  # there is no sound on this side


@dataclass(frozen=True)
class Pauses:
    """What is known of an utterance so far. Immutable: `shorten` returns the next value."""

    sample_rate: int  # Hz
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (n,) dB of the last frames
    since_sound: int = FAR_FRAMES  # frames since the last sound

    @property
    def frame_samples(self) -> int:
        return round(FRAME_S * self.sample_rate)

    def block_samples(self, n: int) -> int:
        """Samples to shorten at once to get about `n`: whole frames, more than a long pause."""
        n_frames = -(-n // self.frame_samples)  # rounded up
        return max(n_frames, 2 * _frames(LONG_S)) * self.frame_samples

    def shorten(self, audio: np.ndarray, last: bool) -> tuple[np.ndarray, int, "Pauses"]:
        """Leave long pauses out of the audio that comes next.

        Args:
            audio: (S,) float32. Unless it is the last, whole frames.
            last: whether the utterance ends here. If not, a pause at the end stays undecided and
                must be given again with what follows.

        Returns:
            The audio without long pauses (S',), the number of samples decided on, and what is
            known after them.
        """
        n_frames = len(audio) // self.frame_samples
        frames = audio[: n_frames * self.frame_samples].reshape(n_frames, self.frame_samples)
        levels = 10 * np.log10(frames.var(axis=1) + SILENCE)  # a constant offset is not sound
        is_sound, pad_frames = self._find_sounds(levels)
        stays = self._near_sounds(is_sound, pad_frames)
        if last:
            rest = audio[frames.size :]  # less than a frame: goes with the one before it
            if not stays[-1:].all():
                rest = rest[:0]
            return np.concatenate([frames[stays].reshape(-1), rest]), len(audio), self

        # Of the pause at the end, as much as a short one may stay if a sound follows.
        n_open = int(np.argmax(stays[::-1])) if stays.any() else n_frames
        n_decided = n_frames - min(n_open, _frames(LONG_S))
        sounds = np.flatnonzero(is_sound[:n_decided])
        last_sound = int(sounds[-1]) if len(sounds) else -1 - self.since_sound
        since_sound = n_decided - 1 - last_sound
        known = np.concatenate([self.levels, levels[:n_decided]])[-_frames(MEMORY_S) :]
        shortened = frames[:n_decided][stays[:n_decided]].reshape(-1)
        following = Pauses(self.sample_rate, known, since_sound)
        return shortened, n_decided * self.frame_samples, following

    def _find_sounds(self, levels: np.ndarray) -> tuple[np.ndarray, int]:
        """(n,) dB -> (n,) bool, which frames are a sound; and how many frames stay beside one."""
        known = np.concatenate([self.levels, levels])
        if not len(known):
            return np.zeros(0, bool), 0
        loudest = known.max()
        floor = np.quantile(known, FLOOR_SHARE)
        stands_out = known >= max(floor + ABOVE_FLOOR_DB, loudest - BELOW_LOUDEST_DB)
        n_around = _frames(AROUND_S)
        padded = np.pad(known, n_around, constant_values=np.inf)
        around = np.lib.stride_tricks.sliding_window_view(padded, 2 * n_around + 1)
        is_steady = known < around.min(axis=1) + ABOVE_FLOOR_DB
        is_soft = known < loudest - SOFT_DB
        is_sound = stands_out & ~(is_steady & is_soft)
        is_noisy = loudest - floor < NOISY_DB
        return is_sound[len(self.levels) :], _frames(NOISY_PAD_S if is_noisy else PAD_S)

    def _near_sounds(self, is_sound: np.ndarray, pad_frames: int) -> np.ndarray:
        """(n,) bool: frames that are a sound, close to one, or in a short pause between two."""
        place = np.arange(len(is_sound))
        last_sound = np.maximum.accumulate(np.where(is_sound, place, -1 - self.since_sound))
        next_sound = np.minimum.accumulate(np.where(is_sound, place, FAR_FRAMES)[::-1])[::-1]
        before = place - last_sound
        after = next_sound - place
        is_close = np.minimum(before, after) <= pad_frames
        is_short_pause = before + after <= _frames(LONG_S)
        return is_close | is_short_pause


def _frames(seconds: float) -> int:
    return round(seconds / FRAME_S)
