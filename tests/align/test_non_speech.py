"""Non-speech sounds: finite, audible, and determined by their seed."""

import numpy as np
import pytest

from tiny_align.align.data.non_speech import KINDS, MAX_S, MIN_S, non_speech
from tiny_align.runtime.audio.samples import check_audio

RATE = 16_000


@pytest.mark.parametrize("seed", range(12))
def test_a_sound_passes_the_audio_check(seed):
    sound = non_speech(np.random.default_rng(seed), RATE)
    check_audio(sound, RATE)
    assert MIN_S * RATE - 1 <= len(sound) <= MAX_S * RATE and sound.dtype == np.float32


def test_a_seed_determines_the_sound():
    one = non_speech(np.random.default_rng(3), RATE)
    again = non_speech(np.random.default_rng(3), RATE)
    other = non_speech(np.random.default_rng(4), RATE)
    assert np.array_equal(one, again) and len(one) != len(other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_any_length(kind):
    for n in (2, 999, RATE):
        sound = kind(np.random.default_rng(0), n, RATE)
        assert sound.shape == (n,) and np.isfinite(sound).all() and sound.any()
