"""Is a recording good enough to learn a person from? Level, clipping, noise and length, said at once and in words.

Limits are our choices; levels are in dBFS, a full-scale sine's RMS being -3.
"""

from dataclasses import dataclass

import numpy as np

FRAME_MS = 20
QUIET_DB = -40.0  # speech below this is mostly the microphone's own noise
CLIPPED_SHARE = 1e-3  # of the samples, at full scale
FULL_SCALE = 0.985
LEAST_SNR_DB = 10.0
LETTERS_PER_S = (2.0, 28.0)  # slower: a pause was recorded; faster: the sentence was cut off


@dataclass(frozen=True)
class Report:
    """What was measured, and what to do about it; no remedy, no problem."""

    seconds: float
    speech_db: float  # RMS of the louder half of the frames
    snr_db: float  # the louder half over the quietest tenth
    clipped: float  # share of the samples
    remedy: str = ""


def check_recording(audio: np.ndarray, sample_rate: int, text: str) -> Report:
    """Measure a recording of `text`, (S,) float32 in [-1, 1]."""
    length = sample_rate * FRAME_MS // 1000
    if len(audio) < 5 * length:
        return Report(len(audio) / sample_rate, -np.inf, 0.0, 0.0, "it is empty: hold the key until the end")
    frames = (audio - audio.mean())[: len(audio) // length * length].reshape(-1, length)
    levels = np.sort(10 * np.log10((frames**2).mean(axis=1) + 1e-12))
    speech = float(_mean_db(levels[len(levels) // 2 :]))
    noise = float(_mean_db(levels[: max(1, len(levels) // 10)]))
    clipped = float((np.abs(audio) >= FULL_SCALE).mean())
    seconds = len(audio) / sample_rate
    measured = (seconds, speech, speech - noise, clipped)
    return Report(*measured, _remedy(*measured, len(text.replace(" ", "")) / seconds))


def _mean_db(levels: np.ndarray) -> float:
    return 10 * np.log10((10 ** (levels / 10)).mean())


def _remedy(seconds: float, speech_db: float, snr_db: float, clipped: float, letters_per_s: float) -> str:
    if speech_db < QUIET_DB:
        return f"it is too quiet ({speech_db:.0f} dBFS): come closer or raise the microphone's level"
    if clipped > CLIPPED_SHARE:
        return f"it is clipped ({clipped:.1%} of the samples): lower the microphone's level"
    if snr_db < LEAST_SNR_DB:
        return f"the noise is only {snr_db:.0f} dB below the voice: find a quieter place"
    if letters_per_s < LETTERS_PER_S[0]:
        return f"it lasts {seconds:.1f} s, long for its sentence: stop right after reading"
    if letters_per_s > LETTERS_PER_S[1]:
        return f"it lasts {seconds:.1f} s, short for its sentence: read all of it"
    return ""
