"""How loud a recording is, how much of it is clipped, and what to tell its owner about it.

Levels are in dBFS, a full-scale sine's RMS being -3. The limits are our choices.
"""

import math
from dataclasses import dataclass

import numpy as np

FRAME_MS = 20
SPOKEN_FRAMES = 5  # speech lasts at least so many frames
SPEECH_RANGE_DB = 20.0  # below its loudest moment
QUIET_DB = -40.0  # speech below this is mostly the microphone's own noise
CLIPPED_SHARE = 1e-3  # of the samples
FULL_SCALE = (0.985, 1.001)
OVERSHOOT = (
    1.5  # a lossy codec's, of clipped sound; beyond it samples are floats that nothing clipped at 1
)
FLAT = 5e-5  # samples that differ by less are equal: one step of 16 bits, and a half
FLAT_RUN = 3  # samples
MIN_FLATS = 4  # speech that is not clipped has one highest peak
MAX_STEP = 0.02  # of the top: samples of few bits (8, mu-law) have flat tops of their own


@dataclass(frozen=True)
class Levels:
    """What was measured of (S,) samples."""

    speech_db: float  # RMS of the frames in which somebody speaks
    noise_db: float  # and of the quietest tenth
    clipped: float  # share of the samples that are at full scale, or in flat tops below it
    peak: float


def measure(audio: np.ndarray, sample_rate: int) -> Levels:
    """Measure (S,) float32; at least SPOKEN_FRAMES frames of FRAME_MS."""
    frames_db = np.sort(frame_levels(audio, sample_rate, FRAME_MS))
    speech = frames_db[frames_db >= frames_db[-SPOKEN_FRAMES] - SPEECH_RANGE_DB]
    noise = frames_db[: max(1, len(frames_db) // 10)]
    return Levels(
        _mean_db(speech), _mean_db(noise), clipped_share(audio), float(np.abs(audio).max())
    )


def notes(audio: np.ndarray, sample_rate: int) -> list[str]:
    """What is wrong with the level of a recording that can be heard nevertheless, in words."""
    levels, found = measure(audio, sample_rate), []
    if levels.clipped > CLIPPED_SHARE:
        where = (
            "at full scale"
            if levels.peak >= FULL_SCALE[0]
            else f"cut flat at {20 * math.log10(levels.peak):.0f} dBFS"
        )
        found.append(
            f"clipped: {levels.clipped:.1%} of the samples are {where}, words may be misheard; "
            "lower the microphone's level and record again"
        )
    if levels.speech_db < QUIET_DB:
        found.append(
            f"too quiet: the speech is at {levels.speech_db:.0f} dBFS, expected at least {QUIET_DB:.0f}; "
            "come closer or raise the microphone's level"
        )
    return found


def frame_levels(audio: np.ndarray, sample_rate: int, frame_ms: int) -> np.ndarray:
    """(S,) -> (frames,) dBFS; a constant offset is not sound, and digital silence is -inf."""
    length = max(1, sample_rate * frame_ms // 1000)
    centred = audio - audio.mean()
    frames = centred[: len(audio) // length * length].reshape(-1, length)  # (frames, length)
    with np.errstate(divide="ignore"):
        return 10 * np.log10((frames**2).mean(axis=1))


def clipped_share(audio: np.ndarray) -> float:
    """Share of the samples at full scale or, clipped before it was turned down, in flat tops."""
    size = np.abs(audio)
    at_full_scale = (size >= FULL_SCALE[0]) & (size <= FULL_SCALE[1])
    at_full_scale &= size.max() <= OVERSHOOT
    return max(
        float(at_full_scale.mean()),
        _flat_share(audio, audio.max()) + _flat_share(audio, audio.min()),
    )


def _flat_share(audio: np.ndarray, edge: float) -> float:
    """Share of the samples that lie in runs at the very top (or bottom) `edge`, if there are several."""
    distance = np.abs(audio - edge)
    is_top = distance <= FLAT
    if distance[~is_top].min(initial=np.inf) > MAX_STEP * abs(edge):
        return 0.0
    changes = np.diff(is_top, prepend=False, append=False)
    bounds = np.flatnonzero(changes)  # begin and end of each run
    lengths = bounds[1::2] - bounds[::2]
    runs = lengths[lengths >= FLAT_RUN]
    return float(runs.sum() / len(audio)) if len(runs) >= MIN_FLATS else 0.0


def _mean_db(levels: np.ndarray) -> float:
    return float(10 * np.log10((10 ** (levels / 10)).mean() + 1e-12))
