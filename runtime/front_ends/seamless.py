"""Wav2Vec2-BERT's front end: Kaldi's log-mel filter bank, normalised per bin, neighbouring frames side by side.

The arithmetic is that of transformers' SeamlessM4TFeatureExtractor. A frame that is left over where the frames do not
fill a row is dropped: the reference pads that row and masks it.
"""

from dataclasses import dataclass, field

import numpy as np

from tiny_align.runtime.front_ends.mel import cut, kaldi_filters

WINDOW_SAMPLES, HOP_SAMPLES, N_FFT = 400, 160, 512  # fixed in the reference, at any rate
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
        log_mel = self._log_mel(audio)
        log_mel = (log_mel - log_mel.mean(axis=0)) / np.sqrt(
            log_mel.var(axis=0, ddof=1) + VARIANCE_GUARD
        )
        n_rows = len(log_mel) // self.stride
        return log_mel[: n_rows * self.stride].reshape(
            n_rows, -1
        )  # (frames, M) -> (rows, stride * M)

    def _log_mel(self, audio: np.ndarray) -> np.ndarray:
        """(S,) -> (frames, n_mels) float32."""
        frames = cut(audio.astype(np.float64) * FULL_SCALE, WINDOW_SAMPLES, HOP_SAMPLES, len(audio))
        frames = frames - frames.mean(axis=1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        window = np.hanning(WINDOW_SAMPLES) ** 0.85  # Povey's
        power = np.abs(np.fft.rfft((frames - PREEMPHASIS * before) * window, N_FFT, axis=-1)) ** 2
        mel = power @ kaldi_filters(self.sample_rate, N_FFT, self.n_mels, MIN_HZ)
        return np.log(np.maximum(mel, MIN_POWER)).astype(np.float32)
