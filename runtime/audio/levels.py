"""How loud a recording is, how much of it is clipped, and what its owner should know about that.

Levels are in dBFS; the RMS of a full-scale sine is -3. The limits are our choices.
"""

import math
from dataclasses import dataclass

import numpy as np

FRAME_MS = 20
SPOKEN_FRAMES = 5  # the least duration of speech
SPEECH_RANGE_DB = 20.0  # below its loudest moment
QUIET_DB = -40.0  # speech below this is mostly the microphone's own noise
CLIPPED_SHARE = 1e-3  # of the samples
FULL_SCALE_MIN = 0.985  # magnitudes that count as full scale
FULL_SCALE_MAX = 1.001
MAX_OVERSHOOT = 1.5  # of clipped sound after a lossy codec; beyond it, floats were not clipped at 1
FLAT = 5e-5  # samples that differ by less are equal: one step of 16 bits, and a half
MIN_FLAT_SAMPLES = 3  # in a row
MIN_FLAT_RUNS = 4  # speech that is not clipped has one highest peak
MAX_STEP = 0.02  # of the top: samples of few bits (8, mu-law) have flat tops of their own


@dataclass(frozen=True)
class Levels:
    """What was measured of (S,) samples."""

    speech_db: float  # RMS of the frames with speech
    noise_db: float  # RMS of the quietest tenth
    clipped: float  # share of the samples that are at full scale, or in flat tops below it
    peak: float  # magnitude


def measure(audio: np.ndarray, sample_rate: int) -> Levels:
    """Measure (S,) float32; at least SPOKEN_FRAMES frames of FRAME_MS."""
    frames_db = np.sort(frame_levels(audio, sample_rate, FRAME_MS))
    speech = frames_db[frames_db >= frames_db[-SPOKEN_FRAMES] - SPEECH_RANGE_DB]
    noise = frames_db[: max(1, len(frames_db) // 10)]
    return Levels(
        speech_db=_mean_db(speech),
        noise_db=_mean_db(noise),
        clipped=clipped_share(audio),
        peak=float(np.abs(audio).max()),
    )


def notes(audio: np.ndarray, sample_rate: int) -> list[str]:
    """What is wrong with the level of a recording that can be used nevertheless, in words."""
    levels = measure(audio, sample_rate)
    found = []
    if levels.clipped > CLIPPED_SHARE:
        where = "at full scale"
        if levels.peak < FULL_SCALE_MIN:
            where = f"cut flat at {20 * math.log10(levels.peak):.0f} dBFS"
        found.append(
            f"clipped: {levels.clipped:.1%} of the samples are {where}, words may be "
            "misunderstood; lower the microphone's level and record again"
        )
    if levels.speech_db < QUIET_DB:
        found.append(
            f"too quiet: the speech is at {levels.speech_db:.0f} dBFS, expected at least "
            f"{QUIET_DB:.0f}; come closer or raise the microphone's level"
        )
    return found


def frame_levels(audio: np.ndarray, sample_rate: int, frame_ms: int) -> np.ndarray:
    """(S,) -> (frames,) dBFS; a constant offset is not sound, and digital silence is -inf."""
    length = max(1, sample_rate * frame_ms // 1000)
    n_frames = len(audio) // length
    centred = audio - audio.mean()
    frames = centred[: n_frames * length].reshape(-1, length)  # (frames, length)
    with np.errstate(divide="ignore"):
        return 10 * np.log10((frames**2).mean(axis=1))


def clipped_share(audio: np.ndarray) -> float:
    """Share of the samples at full scale or, if turned down after clipping, in flat tops."""
    magnitude = np.abs(audio)
    at_full_scale = (magnitude >= FULL_SCALE_MIN) & (magnitude <= FULL_SCALE_MAX)
    at_full_scale &= magnitude.max() <= MAX_OVERSHOOT
    flat_share = _flat_share(audio, audio.max()) + _flat_share(audio, audio.min())
    return max(float(at_full_scale.mean()), flat_share)


def _flat_share(audio: np.ndarray, edge: float) -> float:
    """Share of the samples in runs at the very top (or bottom) `edge`, if there are several."""
    distance = np.abs(audio - edge)
    is_top = distance <= FLAT
    if distance[~is_top].min(initial=np.inf) > MAX_STEP * abs(edge):
        return 0.0
    changes = np.diff(is_top, prepend=False, append=False)
    bounds = np.flatnonzero(changes)  # begin and end of each run
    lengths = bounds[1::2] - bounds[::2]
    runs = lengths[lengths >= MIN_FLAT_SAMPLES]
    return float(runs.sum() / len(audio)) if len(runs) >= MIN_FLAT_RUNS else 0.0


def _mean_db(levels: np.ndarray) -> float:
    return float(10 * np.log10((10 ** (levels / 10)).mean() + 1e-12))
