"""Wav2Vec2-BERT's front end: Kaldi's log-mel filter bank, normalised per bin, frames side by side.

The arithmetic is that of transformers' SeamlessM4TFeatureExtractor. Frames at the end that do not
fill a row are dropped: the reference pads that row and masks it.
"""

from dataclasses import dataclass, field

import numpy as np

from tiny_align.runtime.front_ends.mel import cut, kaldi_filters

WINDOW_SAMPLES = 400  # these three are fixed in the reference, at any rate
HOP_SAMPLES = 160
N_FFT = 512
MIN_HZ = 20.0
PREEMPHASIS = 0.97
MIN_POWER = 1.192092955078125e-07
VARIANCE_GUARD = 1e-7
FULL_SCALE = 2**15  # Kaldi's samples are 16-bit integers


@dataclass(frozen=True)
class FilterBank:
    """Parameters of the front end, stored in the bundle's manifest."""

    kind: str = field(default="filter_bank", init=False)
    sample_rate: int = 16_000  # Hz
    n_mels: int = 80
    stride: int = 2  # frames per row

    @property
    def row_samples(self) -> int:
        return self.stride * HOP_SAMPLES

    @property
    def row_size(self) -> int:
        return self.stride * self.n_mels

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 in [-1, 1] -> (rows, stride * n_mels) float32; S >= WINDOW_SAMPLES."""
        frames = cut(audio.astype(np.float64) * FULL_SCALE, WINDOW_SAMPLES, HOP_SAMPLES, len(audio))
        frames = frames - frames.mean(axis=1, keepdims=True)
        previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)  # one sample earlier
        window = np.hanning(WINDOW_SAMPLES) ** 0.85  # Povey's
        spectrum = np.fft.rfft((frames - PREEMPHASIS * previous) * window, N_FFT, axis=-1)
        power = np.abs(spectrum) ** 2  # (frames, N_FFT // 2 + 1)
        mel = power @ kaldi_filters(self.sample_rate, N_FFT, self.n_mels, MIN_HZ)
        log_mel = np.log(np.maximum(mel, MIN_POWER)).astype(np.float32)  # (frames, M)
        deviation = np.sqrt(log_mel.var(axis=0, ddof=1) + VARIANCE_GUARD)
        normalised = (log_mel - log_mel.mean(axis=0)) / deviation
        n_rows = len(normalised) // self.stride
        return normalised[: n_rows * self.stride].reshape(n_rows, -1)  # (rows, stride * M)
