"""Is a recording good enough to train on? Level, clipping, noise and length.

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
MIN_LETTERS_PER_S = 2.0  # slower: a pause was recorded too
MAX_LETTERS_PER_S = 28.0  # faster: the sentence was cut off


@dataclass(frozen=True)
class RecordingCheck:
    """What was measured, and what the user should do; an empty `remedy`: it is good."""

    seconds: float
    speech_db: float  # RMS of the frames with speech, dBFS
    snr_db: float  # that above the quietest tenth of the frames
    clipped: float  # share of the samples
    remedy: str = ""


def check_recording(audio: np.ndarray, sample_rate: int, text: str) -> RecordingCheck:
    """Measure a recording of `text`, (S,) float32 in [-1, 1]."""
    seconds = len(audio) / sample_rate
    if len(audio) < SPOKEN_FRAMES * (sample_rate * FRAME_MS // 1000):
        return RecordingCheck(
            seconds,
            -np.inf,
            0.0,
            0.0,
            "it is empty: record it again, until the end of the sentence",
        )
    levels = measure(audio, sample_rate)
    snr_db = levels.speech_db - levels.noise_db
    letters_per_s = len(text.replace(" ", "")) / seconds
    remedy = _remedy(seconds, levels.speech_db, snr_db, levels.clipped, letters_per_s)
    return RecordingCheck(seconds, levels.speech_db, snr_db, levels.clipped, remedy)


def _remedy(
    seconds: float, speech_db: float, snr_db: float, clipped: float, letters_per_s: float
) -> str:
    """The first problem and what to do about it; empty if there is none."""
    if speech_db < QUIET_DB:
        return (
            f"it is too quiet ({speech_db:.0f} dBFS): come closer or raise the microphone's level"
        )
    if clipped > CLIPPED_SHARE:
        return f"it is clipped ({clipped:.1%} of the samples): lower the microphone's level"
    if snr_db < MIN_SNR_DB:
        return f"the noise is only {snr_db:.0f} dB below the voice: find a quieter place"
    if letters_per_s < MIN_LETTERS_PER_S:
        return f"it lasts {seconds:.1f} s, long for its sentence: stop right after reading"
    if letters_per_s > MAX_LETTERS_PER_S:
        return f"it lasts {seconds:.1f} s, short for its sentence: read all of it"
    return ""
