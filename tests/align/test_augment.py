"""Augmentations of a recording: other sound, same words; determined by their seed."""

import numpy as np
import pytest

from tiny_align.align.data.augment import (
    PAUSE_S,
    TELEPHONE_HZ,
    augment,
    echo,
    noise,
    pause,
    telephone,
)
from tiny_align.runtime.audio.samples import check_audio

RATE = 16_000
TIME = np.arange(2 * RATE) / RATE
SOUND = (0.5 * np.sin(2 * np.pi * 220 * TIME) * (TIME > 0.5)).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_an_augmentation_passes_the_audio_check_and_differs(seed):
    augmented = augment(SOUND, RATE, np.random.default_rng(seed))
    check_audio(augmented, RATE)
    assert augmented.dtype == np.float32
    assert 0.8 * len(SOUND) < len(augmented) < 1.2 * len(SOUND) + PAUSE_S[1] * RATE
    assert len(augmented) != len(SOUND) or not np.allclose(augmented, SOUND, atol=1e-3)


def test_a_seed_determines_the_augmentation():
    one = augment(SOUND, RATE, np.random.default_rng(3))
    again = augment(SOUND, RATE, np.random.default_rng(3))
    other = augment(SOUND, RATE, np.random.default_rng(4))
    assert np.array_equal(one, again) and len(one) != len(other)


@pytest.mark.parametrize("snr_db", [0, 10, 30])
def test_noise_has_the_signal_to_noise_ratio_asked_for(snr_db):
    sound = noise(SOUND, RATE, snr_db, np.random.default_rng(0))
    assert 10 * np.log10(np.mean(SOUND**2) / np.mean(sound**2)) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_a_pause_is_inserted_at_a_quiet_moment_and_every_sample_stays(seed):
    words = np.where((TIME > 0.9) & (TIME < 1.0), 1e-4, 0.5) * np.sin(2 * np.pi * 220 * TIME)
    with_pause = pause(words, RATE, np.random.default_rng(seed))
    n = len(with_pause) - len(words)
    at = int(np.argmax(with_pause[: len(words)] != words))
    assert PAUSE_S[0] * RATE <= n <= PAUSE_S[1] * RATE + 1
    assert np.array_equal(np.concatenate([with_pause[:at], with_pause[at + n :]]), words)
    assert seed or 0.9 < at / RATE < 1.0


def test_echo_keeps_the_sound_and_adds_a_weaker_tail():
    knock = np.zeros(RATE)
    knock[1000] = 1.0
    echoed = echo(knock, RATE, np.random.default_rng(0))
    assert len(echoed) == RATE and not echoed[:1000].round(9).any()
    assert echoed[1000] == pytest.approx(1, abs=0.1) and 0 < np.sum(echoed[1001:] ** 2) < 0.2


def test_telephone_passes_its_band_only():
    passed = {}  # Hz -> share of the power
    for hz in (100, 1000, 5000):
        tone = np.sin(2 * np.pi * hz * TIME)
        passed[hz] = np.mean(telephone(tone, RATE) ** 2) / np.mean(tone**2)
    assert TELEPHONE_HZ[0] > 100 and TELEPHONE_HZ[1] < 5000
    assert passed[1000] == pytest.approx(1, abs=0.01)
    assert max(passed[100], passed[5000]) < 0.01
