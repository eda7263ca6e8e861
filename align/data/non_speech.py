"""Sounds in which nothing is said: hum, hiss, tones, sweeps, knocks, gusts.

A projector that hears words in them invents answers. They are made, not recorded, so that they cost nothing to
ship; training takes them as utterances without a word. Kinds, ranges and levels are our choices.
"""

import numpy as np

MIN_S, MAX_S = 0.6, 3.0
LEVELS_DB = (-50.0, -10.0)  # RMS, dBFS
NOTES_HZ = 55.0 * 2.0 ** (np.arange(60) / 12)


def hiss(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Noise whose spectrum falls by 0 to 12 dB per octave: white, pink, brown and between."""
    frequency = np.fft.rfftfreq(n, 1 / sample_rate).clip(20)
    spectrum = np.fft.rfft(rng.standard_normal(n)) * frequency ** -rng.uniform(0, 2)
    swell = np.interp(np.arange(n), np.linspace(0, n, 6), rng.uniform(0.3, 1.0, 6))
    return np.fft.irfft(spectrum, n) * (swell if rng.random() < 0.5 else 1)


def hum(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Mains or a motor: a fundamental with harmonics that fall off."""
    time, base = np.arange(n) / sample_rate, rng.choice([50, 60, rng.uniform(40, 300)])
    fall = rng.uniform(0.5, 2)
    parts = [
        k**-fall * np.sin(2 * np.pi * (k * base * time + rng.random()))
        for k in range(1, rng.integers(2, 12))
    ]
    return np.sum(parts, axis=0)


def tones(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Notes and chords that are struck or held, one after another: like music."""
    out, at = np.zeros(n), 0
    while at < n:
        length = min(n - at, int(rng.uniform(0.08, 0.8) * sample_rate))
        time = np.arange(length) / sample_rate
        envelope = np.minimum(1, time / 0.01) * np.exp(-time * rng.uniform(0, 8))
        for note in rng.choice(NOTES_HZ, rng.integers(1, 4)):
            for k in range(1, rng.integers(2, 6)):
                out[at : at + length] += envelope * np.sin(2 * np.pi * k * note * time) / k
        at += length
    return out


def knocks(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Short dull or bright sounds at odd times: keys, doors, steps."""
    out = np.zeros(n)
    for at in rng.integers(0, n, rng.integers(1, 8)):
        length = min(n - at, int(rng.uniform(0.01, 0.15) * sample_rate))
        decay = np.exp(-np.arange(length) / length * rng.uniform(3, 8))
        out[at : at + length] += decay * hiss(rng, max(2, length), sample_rate)[:length]
    return out + 1e-3 * hiss(rng, n, sample_rate)


def sweeps(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Sirens, whistles, birds: a tone that glides, with harmonics or without, and breaks off."""
    corners = rng.integers(3, 12)
    pitch = np.interp(
        np.arange(n), np.linspace(0, n, corners), 2 ** rng.uniform(7, 11.5, corners)
    )  # 128..2900 Hz
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    sound = sum(np.sin(k * phase) / k for k in range(1, rng.integers(2, 5)))
    return sound * np.interp(np.arange(n), np.linspace(0, n, 16), rng.random(16) > 0.3)


def gusts(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Noise of a few bands that comes and goes at the pace of syllables: wind, breath, cloth, an engine."""
    frequency, band = np.fft.rfftfreq(n, 1 / sample_rate), 0.0
    for centre in 2 ** rng.uniform(7.5, 12, rng.integers(1, 4)):
        band = band + np.exp(-0.5 * ((frequency - centre) / (centre * rng.uniform(0.05, 0.5))) ** 2)
    sound = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * band, n)
    pace = rng.uniform(1, 8) * n / sample_rate  # bursts in all
    return sound * np.abs(np.sin(np.pi * pace * np.arange(n) / n + rng.random())) ** rng.uniform(
        0.5, 4
    )


KINDS = (hiss, hum, tones, sweeps, knocks, gusts)


def non_speech(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """(S,) float32 in [-1, 1]: one such sound, or two together."""
    n = int(rng.uniform(MIN_S, MAX_S) * sample_rate)
    sound = sum(_unit(kind(rng, n, sample_rate)) for kind in rng.choice(KINDS, rng.integers(1, 3)))
    level = 10 ** (rng.uniform(*LEVELS_DB) / 20)
    return np.clip(_unit(sound) * level, -1, 1).astype(np.float32)


def _unit(sound: np.ndarray) -> np.ndarray:
    return sound / np.sqrt(np.mean(sound**2)).clip(1e-9)
