"""Non-speech: sounds without a word (hum, hiss, tones, sweeps, knocks, gusts).

A projector that finds words in them makes the LLM answer to nothing. The sounds are computed, not
recorded, so they add nothing to the package; training takes them as utterances with an empty
transcript. Kinds, ranges and levels are our choices.
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
    time = np.arange(n) / sample_rate
    base = rng.choice([50, 60, rng.uniform(40, 300)])
    fall = rng.uniform(0.5, 2)
    harmonics = []
    for k in range(1, rng.integers(2, 12)):
        harmonics.append(k**-fall * np.sin(2 * np.pi * (k * base * time + rng.random())))
    return np.sum(harmonics, axis=0)


def tones(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Notes and chords that are struck or sustained, one after another, as in music."""
    out = np.zeros(n)
    at = 0
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
    """Short dull or bright sounds at random times: keys, doors, steps."""
    out = np.zeros(n)
    for at in rng.integers(0, n, rng.integers(1, 8)):
        length = min(n - at, int(rng.uniform(0.01, 0.15) * sample_rate))
        decay = np.exp(-np.arange(length) / length * rng.uniform(3, 8))
        out[at : at + length] += decay * hiss(rng, max(2, length), sample_rate)[:length]
    return out + 1e-3 * hiss(rng, n, sample_rate)


def sweeps(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Sirens, whistles, birds: a tone that glides, with harmonics or without, and breaks off."""
    n_corners = rng.integers(3, 12)
    corners_hz = 2 ** rng.uniform(7, 11.5, n_corners)  # 128 to 2,900 Hz
    pitch_hz = np.interp(np.arange(n), np.linspace(0, n, n_corners), corners_hz)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / sample_rate
    sound = np.zeros(n)
    for k in range(1, rng.integers(2, 5)):
        sound += np.sin(k * phase) / k
    return sound * np.interp(np.arange(n), np.linspace(0, n, 16), rng.random(16) > 0.3)


def gusts(rng: np.random.Generator, n: int, sample_rate: int) -> np.ndarray:
    """Noise of a few bands that swells as fast as syllables: wind, breath, cloth, an engine."""
    frequency = np.fft.rfftfreq(n, 1 / sample_rate)
    band = np.zeros(len(frequency))
    for centre in 2 ** rng.uniform(7.5, 12, rng.integers(1, 4)):
        width = centre * rng.uniform(0.05, 0.5)
        band = band + np.exp(-0.5 * ((frequency - centre) / width) ** 2)
    sound = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * band, n)
    n_bursts = rng.uniform(1, 8) * n / sample_rate
    swell = np.abs(np.sin(np.pi * n_bursts * np.arange(n) / n + rng.random()))
    return sound * swell ** rng.uniform(0.5, 4)


KINDS = (hiss, hum, tones, sweeps, knocks, gusts)


def non_speech(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Make one sound, or two at once, as (S,) float32 in [-1, 1]."""
    n = int(rng.uniform(MIN_S, MAX_S) * sample_rate)
    sound = np.zeros(n)
    for kind in rng.integers(len(KINDS), size=rng.integers(1, 3)):
        sound += _unit_power(KINDS[kind](rng, n, sample_rate))
    level = 10 ** (rng.uniform(*LEVELS_DB) / 20)
    return np.clip(_unit_power(sound) * level, -1, 1).astype(np.float32)


def _unit_power(sound: np.ndarray) -> np.ndarray:
    return sound / np.sqrt(np.mean(sound**2)).clip(1e-9)
