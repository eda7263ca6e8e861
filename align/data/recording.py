"""Is a recording good enough to learn a person from? Level, clipping, noise and length, said at once and in words.

Level and clipping are measured in runtime/audio/levels.py; the other limits are our choices.
"""

from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.audio.levels import (
    CLIPPED_SHARE,
    FRAME_MS,
    QUIET_DB,
    SPOKEN_FRAMES,
    measure,
)

MIN_SNR_DB = 10.0
LETTERS_PER_S = (2.0, 28.0)  # slower: a pause was recorded; faster: the sentence was cut off


@dataclass(frozen=True)
class Report:
    """What was measured, and what to do about it; no remedy, no problem."""

    seconds: float
    speech_db: float  # RMS of the frames in which somebody speaks, dBFS
    snr_db: float  # that over the quietest tenth
    clipped: float  # share of the samples
    remedy: str = ""


def check_recording(audio: np.ndarray, sample_rate: int, text: str) -> Report:
    """Measure a recording of `text`, (S,) float32 in [-1, 1]."""
    if len(audio) < SPOKEN_FRAMES * (sample_rate * FRAME_MS // 1000):
        return Report(
            len(audio) / sample_rate, -np.inf, 0.0, 0.0, "it is empty: hold the key until the end"
        )
    levels, seconds = measure(audio, sample_rate), len(audio) / sample_rate
    measured = (seconds, levels.speech_db, levels.speech_db - levels.noise_db, levels.clipped)
    return Report(*measured, _remedy(*measured, len(text.replace(" ", "")) / seconds))


def _remedy(
    seconds: float, speech_db: float, snr_db: float, clipped: float, letters_per_s: float
) -> str:
    if speech_db < QUIET_DB:
        return (
            f"it is too quiet ({speech_db:.0f} dBFS): come closer or raise the microphone's level"
        )
    if clipped > CLIPPED_SHARE:
        return f"it is clipped ({clipped:.1%} of the samples): lower the microphone's level"
    if snr_db < MIN_SNR_DB:
        return f"the noise is only {snr_db:.0f} dB below the voice: find a quieter place"
    if letters_per_s < LETTERS_PER_S[0]:
        return f"it lasts {seconds:.1f} s, long for its sentence: stop right after reading"
    if letters_per_s > LETTERS_PER_S[1]:
        return f"it lasts {seconds:.1f} s, short for its sentence: read all of it"
    return ""
