"""Augmentation: the same recording at another speed, in a room, in noise, over a telephone.

A user records about a hundred sentences; the projector is trained on a few augmentations of each as
well. Augmentation works on samples, so it serves any encoder. Kinds, ranges and odds are our
choices.
"""

import numpy as np
import soxr

from tiny_align.align.data.non_speech import hiss, hum, tones

# Resampled: pitch and vocal tract change too
# (Ko et al. 2015, "Audio Augmentation for Speech Recognition").
SPEED = (0.88, 1.14)
ECHO_ODDS = 0.3
ECHO_S = (0.1, 0.5)
ECHO_LEVEL = (0.05, 0.4)
NOISE_ODDS = 0.6
SNR_DB = (5.0, 30.0)
TELEPHONE_ODDS = 0.15
TELEPHONE_HZ = (300.0, 3400.0)
GAIN_DB = (-12.0, 6.0)
PAUSE_ODDS = 0.3
PAUSE_S = (0.3, 1.0)
PAUSE_DB = (-60.0, -25.0)  # relative to the speech
NOISES = (hiss, hiss, hum, tones)  # hiss twice as often


def augment(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Make one augmentation with the same words: (S,) float32 -> (S',) float32 in [-1, 1]."""
    speed = rng.uniform(*SPEED)
    augmented = soxr.resample(audio, sample_rate * speed, sample_rate).astype(np.float64)
    if rng.random() < ECHO_ODDS:
        augmented = echo(augmented, sample_rate, rng)
    if rng.random() < PAUSE_ODDS:
        augmented = pause(augmented, sample_rate, rng)
    if rng.random() < NOISE_ODDS:
        augmented = augmented + noise(augmented, sample_rate, rng.uniform(*SNR_DB), rng)
    if rng.random() < TELEPHONE_ODDS:
        augmented = telephone(augmented, sample_rate)
    augmented = augmented * 10 ** (rng.uniform(*GAIN_DB) / 20)
    return (augmented / max(1.0, np.abs(augmented).max())).astype(np.float32)


def echo(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Add a room's reverberation: a tail of noise that falls by 60 dB within ECHO_S; (S,)."""
    length = int(rng.uniform(*ECHO_S) * sample_rate)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= rng.uniform(*ECHO_LEVEL) / np.sqrt(np.sum(tail**2))
    n = len(audio) + length
    reverberation = np.fft.irfft(np.fft.rfft(audio, n) * np.fft.rfft(tail, n), n)
    return audio + reverberation[: len(audio)]


def pause(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Insert room noise at the quietest moment of a random quarter of the recording; (S',)."""
    quarter = len(audio) // 4
    start = rng.integers(quarter, 2 * quarter + 1)
    energy = np.convolve(audio[start : start + quarter] ** 2, np.ones(sample_rate // 20), "same")
    at = start + int(np.argmin(energy)) if quarter else 0
    level = np.sqrt(np.mean(audio**2)) * 10 ** (rng.uniform(*PAUSE_DB) / 20)
    room = level * rng.standard_normal(round(rng.uniform(*PAUSE_S) * sample_rate))
    return np.concatenate([audio[:at], room, audio[at:]])


def noise(
    audio: np.ndarray, sample_rate: int, snr_db: float, rng: np.random.Generator
) -> np.ndarray:
    """Hiss, hum or tones, `snr_db` below the audio; (S,)."""
    make = NOISES[rng.integers(len(NOISES))]
    sound = make(rng, len(audio), sample_rate)
    ratio = np.mean(audio**2) / np.mean(sound**2).clip(1e-12)
    return sound * np.sqrt(ratio) * 10 ** (-snr_db / 20)


def telephone(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Remove everything outside TELEPHONE_HZ."""
    spectrum = np.fft.rfft(audio)
    hz = np.fft.rfftfreq(len(audio), 1 / sample_rate)
    low, high = TELEPHONE_HZ
    return np.fft.irfft(np.where((hz >= low) & (hz <= high), spectrum, 0), len(audio))
