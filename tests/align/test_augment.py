"""Variations of a recording: the same words, another sound; the same again with their seed."""

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
def test_a_variation_can_be_heard_and_is_another_sound(seed):
    varied = augment(SOUND, RATE, np.random.default_rng(seed))
    check_audio(varied, RATE)
    assert varied.dtype == np.float32
    assert 0.8 * len(SOUND) < len(varied) < 1.2 * len(SOUND) + PAUSE_S[1] * RATE
    assert len(varied) != len(SOUND) or not np.allclose(varied, SOUND, atol=1e-3)


def test_a_seed_determines_the_variation():
    one, again, other = (augment(SOUND, RATE, np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(one, again) and len(one) != len(other)


@pytest.mark.parametrize("snr_db", [0, 10, 30])
def test_noise_lies_as_far_below_as_asked(snr_db):
    sound = noise(SOUND, RATE, snr_db, np.random.default_rng(0))
    assert 10 * np.log10(np.mean(SOUND**2) / np.mean(sound**2)) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_a_pause_is_put_into_a_quiet_moment_and_nothing_is_lost(seed):
    words = np.where((TIME > 0.9) & (TIME < 1.0), 1e-4, 0.5) * np.sin(2 * np.pi * 220 * TIME)
    parted = pause(words, RATE, np.random.default_rng(seed))
    n = len(parted) - len(words)
    at = int(np.argmax(parted[: len(words)] != words))
    assert PAUSE_S[0] * RATE <= n <= PAUSE_S[1] * RATE + 1
    assert np.array_equal(np.concatenate([parted[:at], parted[at + n :]]), words)
    assert seed or 0.9 < at / RATE < 1.0


def test_a_room_keeps_the_sound_and_rings_on():
    knock = np.zeros(RATE)
    knock[1000] = 1.0
    heard = echo(knock, RATE, np.random.default_rng(0))
    assert len(heard) == RATE and not heard[:1000].round(9).any()
    assert heard[1000] == pytest.approx(1, abs=0.1) and 0 < np.sum(heard[1001:] ** 2) < 0.2


def test_a_telephone_passes_its_band_only():
    tones = {hz: np.sin(2 * np.pi * hz * TIME) for hz in (100, 1000, 5000)}
    left = {
        hz: np.mean(telephone(tone, RATE) ** 2) / np.mean(tone**2) for hz, tone in tones.items()
    }
    assert TELEPHONE_HZ[0] > 100 and TELEPHONE_HZ[1] < 5000
    assert left[1000] == pytest.approx(1, abs=0.01) and max(left[100], left[5000]) < 0.01
