"""NeMo's log-mel front end in numpy: waveform -> (frames, mel bins).

The arithmetic is that of transformers' ParakeetFeatureExtractor (NeMo's FastConformer front end):
pre-emphasis, centred Hann window, power spectrum, Slaney mel filters, log, per-bin normalisation
over the utterance. There are two additions, off by default: levels far below the loudest are
raised to a floor, and the normalisation is that of the loud frames, so that it does not depend on
the silence around the speech. It reads no files and resamples nothing; the audio room does.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tiny_align.runtime.front_ends.mel import cut, slaney_filters

LOG_GUARD = 2.0**-24  # added before the logarithm, as the reference does
STD_GUARD = 1e-5
MIN_LOUD = 25  # frames that count as loud at least
QUIET_SHARE = 0.05  # of the frames lie below the quiet level


@dataclass(frozen=True)
class NemoMel:
    """Parameters of the front end, stored in the bundle's manifest."""

    kind: str = field(default="nemo", init=False)
    sample_rate: int = 16_000  # Hz
    n_mels: int = 80
    n_fft: int = 512
    window_samples: int = 400  # 25 ms
    hop_samples: int = 160  # 10 ms
    preemphasis: float = 0.97
    floor_db: float | None = None  # below the loudest mel level; None: no floor
    # A frame is loud above this share of the range of levels; None: all frames are.
    speech_share: float | None = None

    @property
    def row_samples(self) -> int:
        return self.hop_samples

    @property
    def row_size(self) -> int:
        return self.n_mels

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 in [-1, 1] -> (S // hop_samples, n_mels) float32, normalised."""
        return self.finish(self.log_mel(audio))

    def log_mel(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 -> (S // hop_samples, n_mels) float32 log power, not normalised."""
        n_frames = len(audio) // self.hop_samples
        emphasised = np.concatenate([audio[:1], audio[1:] - self.preemphasis * audio[:-1]])
        padded = np.pad(emphasised, self.n_fft // 2)
        frames = cut(padded, self.n_fft, self.hop_samples, n_frames)
        power = np.abs(np.fft.rfft(frames * _window(self), axis=-1)) ** 2  # (N, n_fft // 2 + 1)
        filters = slaney_filters(self.sample_rate, self.n_fft, self.n_mels).astype(np.float32)
        return np.log(power @ filters + LOG_GUARD).astype(np.float32)

    def finish(self, log_mel: np.ndarray) -> np.ndarray:
        """What follows the logarithm: floor, then normalisation."""
        return self.normalise(self.raise_to_floor(log_mel)).astype(np.float32)

    def raise_to_floor(self, log_mel: np.ndarray) -> np.ndarray:
        """(frames, M) -> the same, nothing further than `floor_db` below the loudest."""
        if self.floor_db is None:
            return log_mel
        return np.maximum(log_mel, log_mel.max() - self.floor_db * np.log(10) / 10)

    def normalise(self, log_mel: np.ndarray) -> np.ndarray:
        """(frames, M): give each bin zero mean and unit variance over the utterance.

        With a `speech_share`, over its loud frames: speech rather than silence, and the MIN_LOUD
        loudest frames in any case.
        """
        loud = log_mel
        if self.speech_share is not None:
            level = log_mel.max(axis=1)  # (frames,)
            ordered = np.sort(level)
            quiet = ordered[int(QUIET_SHARE * (len(ordered) - 1))]
            threshold = quiet + self.speech_share * (ordered[-1] - quiet)
            loud = log_mel[level >= min(threshold, ordered[-min(MIN_LOUD, len(ordered))])]
        return (log_mel - loud.mean(axis=0)) / (loud.std(axis=0, ddof=1) + STD_GUARD)


@lru_cache
def _window(front_end: NemoMel) -> np.ndarray:
    """The symmetric Hann window, centred in n_fft samples."""
    n_missing = front_end.n_fft - front_end.window_samples
    n_before = n_missing // 2
    hann = np.hanning(front_end.window_samples)
    return np.pad(hann, (n_before, n_missing - n_before)).astype(np.float32)
