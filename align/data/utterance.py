"""One utterance of a data set: where its audio lies, and its transcript."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.audio.samples import read_audio, read_segment


@dataclass(frozen=True)
class Utterance:
    """One recorded sentence with its transcript; the audio is read by `load` only."""

    audio: Path
    text: str
    split: str
    start_s: float | None = None  # None: from the beginning
    end_s: float | None = None  # None: to the end
    speaker: str | None = None

    def load(self, sample_rate: int) -> np.ndarray:
        """(S,) float32 at `sample_rate`; raises AudioError, as runtime/audio/samples.py does."""
        if self.start_s is None and self.end_s is None:
            return read_audio(self.audio, sample_rate)
        return read_segment(self.audio, sample_rate, self.start_s or 0.0, self.end_s)
