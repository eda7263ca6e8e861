"""What a microphone did to a window of speech, undone before the front end: clipping, an offset, a low level.

Speech as encoders are trained on passes as it is, sample by sample. The limits are our choices.
"""

import numpy as np

from tiny_align.runtime.declip import declip

FRAME_S = 0.025
LOUDEST_DB = -20.0  # dBFS: a window whose loudest frame is quieter is raised to it
OFFSET_SHARE = 0.05  # of the RMS: a mean beyond it is an offset


def condition(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """A window (S,) float32 in [-1, 1] -> the same speech, unclipped, centred and loud enough."""
    if not len(audio):
        return audio
    audio = declip(audio)
    mean, deviation = float(audio.mean()), float(audio.std())
    if abs(mean) > OFFSET_SHARE * deviation:
        audio = audio - np.float32(mean)
    loudest, wanted = _loudest(audio, sample_rate), 10 ** (LOUDEST_DB / 20)
    return audio * np.float32(wanted / loudest) if 0 < loudest < wanted else audio


def _loudest(audio: np.ndarray, sample_rate: int) -> float:
    """RMS of the loudest frame; of audio that is shorter than one, of all."""
    length = min(len(audio), round(FRAME_S * sample_rate))
    frames = audio[: len(audio) // length * length].reshape(-1, length)
    return float(np.sqrt((frames**2).mean(axis=1).max()))
