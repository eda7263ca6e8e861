"""A recording made a little differently: said faster or slower, in another room, with a pause, in noise, by telephone.

A person records a hundred sentences; the projector is trained on a few augmentations of each as well. They are made of
the samples themselves, so that they serve any encoder. Kinds, ranges and odds are our choices.
"""

import numpy as np
import soxr

from tiny_align.align.data.non_speech import hiss, hum, tones

SPEED = (
    0.88,
    1.14,
)  # resampled: pitch and throat change too (Ko et al. 2015, "Audio Augmentation for Speech Recognition")
ECHO_ODDS, ECHO_S, ECHO_LEVEL = 0.3, (0.1, 0.5), (0.05, 0.4)
NOISE_ODDS, SNR_DB = 0.6, (5.0, 30.0)
TELEPHONE_ODDS, TELEPHONE_HZ = 0.15, (300.0, 3400.0)
GAIN_DB = (-12.0, 6.0)
PAUSE_ODDS, PAUSE_S, PAUSE_DB = 0.3, (0.3, 1.0), (-60.0, -25.0)  # level to the speech's


def augment(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """(S,) float32 -> (S',) float32 in [-1, 1]: the same words."""
    varied = soxr.resample(audio, sample_rate * rng.uniform(*SPEED), sample_rate).astype(np.float64)
    if rng.random() < ECHO_ODDS:
        varied = echo(varied, sample_rate, rng)
    if rng.random() < PAUSE_ODDS:
        varied = pause(varied, sample_rate, rng)
    if rng.random() < NOISE_ODDS:
        varied = varied + noise(varied, sample_rate, rng.uniform(*SNR_DB), rng)
    if rng.random() < TELEPHONE_ODDS:
        varied = telephone(varied, sample_rate)
    varied = varied * 10 ** (rng.uniform(*GAIN_DB) / 20)
    return (varied / max(1.0, np.abs(varied).max())).astype(np.float32)


def echo(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """A room: the sound and a tail of noise that decays by 60 dB within ECHO_S; as long as before."""
    length = int(rng.uniform(*ECHO_S) * sample_rate)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= rng.uniform(*ECHO_LEVEL) / np.sqrt(np.sum(tail**2))
    n = len(audio) + length
    return audio + np.fft.irfft(np.fft.rfft(audio, n) * np.fft.rfft(tail, n), n)[: len(audio)]


def pause(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """A silence of the room in the quietest moment of a quarter of the recording; (S',)."""
    quarter = len(audio) // 4
    start = rng.integers(quarter, 2 * quarter + 1)
    energy = np.convolve(audio[start : start + quarter] ** 2, np.ones(sample_rate // 20), "same")
    at = start + int(np.argmin(energy)) if quarter else 0
    level = np.sqrt(np.mean(audio**2)) * 10 ** (rng.uniform(*PAUSE_DB) / 20)
    silence = level * rng.standard_normal(round(rng.uniform(*PAUSE_S) * sample_rate))
    return np.concatenate([audio[:at], silence, audio[at:]])


def noise(
    audio: np.ndarray, sample_rate: int, snr_db: float, rng: np.random.Generator
) -> np.ndarray:
    """Hiss, hum or tones, `snr_db` below the audio; (S,)."""
    sound = rng.choice((hiss, hiss, hum, tones))(rng, len(audio), sample_rate)
    return sound * np.sqrt(np.mean(audio**2) / np.mean(sound**2).clip(1e-12)) * 10 ** (-snr_db / 20)


def telephone(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Nothing outside TELEPHONE_HZ."""
    spectrum, hz = np.fft.rfft(audio), np.fft.rfftfreq(len(audio), 1 / sample_rate)
    low, high = TELEPHONE_HZ
    return np.fft.irfft(np.where((hz >= low) & (hz <= high), spectrum, 0), len(audio))
