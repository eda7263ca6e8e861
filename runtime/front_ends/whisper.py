"""Whisper's front end: a recording, padded with silence to its 30 s -> (3000, mel bins).

The arithmetic is that of transformers' WhisperFeatureExtractor. Whisper's encoder was trained on
windows of 30 s only: it has a position for every frame of one, and every frame sees the silence
after the speech. So the window keeps its size, and so does the encoder's graph. We save the work
on the silence here, and everything after the encoder, because the runtime drops the features of
the padding. If a device cannot afford 30 s of encoder for 3 s of speech, set a smaller
`chunk_length` in the preprocessor_config.json for `tiny-align export`: it makes a shorter window,
for which the encoder uses its first positions. That is another encoder, close to the first; train
the projector with it.
"""

from dataclasses import dataclass, field

import numpy as np

from tiny_align.runtime.front_ends.mel import cut, slaney_filters

MIN_POWER = 1e-10
RANGE = 8.0  # below the loudest, in powers of ten


@dataclass(frozen=True)
class WhisperMel:
    """Parameters of the front end, stored in the bundle's manifest."""

    kind: str = field(default="whisper", init=False)
    sample_rate: int = 16_000  # Hz
    n_mels: int = 80
    n_fft: int = 400  # and the window's length
    hop_samples: int = 160  # 10 ms
    padded_samples: int = 480_000  # 30 s

    @property
    def row_samples(self) -> int:
        return self.hop_samples

    @property
    def row_size(self) -> int:
        return self.n_mels

    @property
    def n_rows(self) -> int:
        return self.padded_samples // self.hop_samples

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 in [-1, 1], S <= padded_samples -> (n_rows, n_mels) float32."""
        margin = self.n_fft // 2
        full = np.pad(audio, (0, self.padded_samples - len(audio)))
        padded = np.pad(full, margin, mode="reflect")
        # Only frames that the speech reaches into; the others hold silence.
        n_frames = min(-(-(len(audio) + margin) // self.hop_samples), self.n_rows)
        frames = cut(padded, self.n_fft, self.hop_samples, n_frames)
        window = np.hanning(self.n_fft + 1)[:-1]  # periodic
        power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2  # (N, n_fft // 2 + 1)
        mel = power @ slaney_filters(self.sample_rate, self.n_fft, self.n_mels)
        log_mel = np.full((self.n_rows, self.n_mels), np.log10(MIN_POWER))
        log_mel[: len(mel)] = np.log10(np.maximum(mel, MIN_POWER))
        log_mel = np.maximum(log_mel, log_mel.max() - RANGE)
        return ((log_mel + 4) / 4).astype(np.float32)
