"""The front end of encoders that take samples: wav2vec2, HuBERT, WavLM, Data2Vec-Audio, Moonshine.

The arithmetic is that of transformers' Wav2Vec2FeatureExtractor for one recording.
"""

from dataclasses import dataclass, field

import numpy as np

VARIANCE_GUARD = 1e-7


@dataclass(frozen=True)
class Waveform:
    """Parameters of the front end, stored in the bundle's manifest."""

    kind: str = field(default="waveform", init=False)
    sample_rate: int = 16_000  # Hz
    normalise: bool = True  # to zero mean and unit variance over the recording

    @property
    def row_samples(self) -> int:
        return 1

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 in [-1, 1] -> (S,) float32."""
        if not self.normalise:
            return audio
        return (audio - audio.mean()) / np.sqrt(audio.var() + VARIANCE_GUARD)
