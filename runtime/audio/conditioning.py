"""A window of speech before the front end: undo clipping, a constant offset and a low level.

Speech like that which encoders are trained on passes unchanged, sample by sample. The limits are
our choices.
"""

import numpy as np

from tiny_align.runtime.audio.declip import declip
from tiny_align.runtime.audio.levels import frame_levels

FRAME_MS = 25
LOUDEST_DB = -20.0  # dBFS: a window whose loudest frame is quieter is raised to it
OFFSET_SHARE = 0.05  # of the RMS: a mean beyond it is an offset


def condition(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """A window (S,) float32 in [-1, 1] -> the same speech, unclipped, centred and loud enough."""
    if not len(audio):
        return audio
    audio = declip(audio)
    mean = float(audio.mean())
    deviation = float(audio.std())
    if abs(mean) > OFFSET_SHARE * deviation:
        audio = audio - np.float32(mean)
    loudest_db = frame_levels(audio, sample_rate, FRAME_MS).max(initial=-np.inf)
    if not -np.inf < loudest_db < LOUDEST_DB:
        return audio
    return audio * np.float32(10 ** ((LOUDEST_DB - loudest_db) / 20))
