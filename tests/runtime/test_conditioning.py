"""Clipping, an offset and a low level are undone, and speech without them is left alone, sample by sample."""

import json

import numpy as np
import pytest
import soxr

from tiny_align.align.data.non_speech import non_speech
from tiny_align.runtime.audio.conditioning import LOUDEST_DB, condition
from tiny_align.runtime.audio.declip import clipping, declip
from tiny_align.runtime.audio.samples import read_audio

RATE = 16_000


@pytest.fixture(scope="module")
def takes(voice_path):
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    return [read_audio(voice_path / row["file_name"], RATE) for row in rows[::10]]


def gained(audio, db):
    return audio * np.float32(10 ** (db / 20))


def clipped(audio, db):
    return np.clip(gained(audio / np.abs(audio).max(initial=1e-9), db), -1, 1)


def distance_db(audio, original):
    """How far the original lies above the difference, whatever the level."""
    scale = np.dot(audio, original) / np.dot(audio, audio)
    return 10 * np.log10(np.sum(original**2) / np.sum((scale * audio - original) ** 2))


@pytest.mark.parametrize(("db", "nearer_db"), [(6, 6), (12, 4)])
def test_clipped_speech_comes_near_to_what_was_said(takes, db, nearer_db):
    for original in takes[:3]:
        damaged = clipped(original, db)
        assert distance_db(declip(damaged), original) > distance_db(damaged, original) + nearer_db
        assert np.abs(declip(damaged)).max() <= 1


def test_speech_that_was_resampled_after_it_was_clipped_is_mended_too(takes):
    original = takes[0]
    high = soxr.resample(original, RATE, 44_100)
    damaged = soxr.resample(clipped(high, 12), 44_100, RATE)
    assert distance_db(declip(damaged), original) > distance_db(damaged, original) + 4


def test_one_side_alone_may_be_clipped(takes):
    damaged = np.minimum(takes[0], 0.3 * takes[0].max())
    above, below = clipping(damaged)
    assert above < np.inf and below == np.inf
    assert distance_db(declip(damaged), takes[0]) > distance_db(damaged, takes[0]) + 4


def test_speech_and_noise_that_are_not_clipped_are_left_alone(takes):
    noises = [non_speech(np.random.default_rng(seed), RATE) for seed in range(5)]
    for audio in [
        *takes,
        np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32),
        np.zeros(RATE, np.float32),
    ]:
        assert declip(audio) is audio
    assert all(np.isfinite(declip(audio)).all() for audio in noises)


@pytest.mark.parametrize("n", [0, 1, 100, 767, 769])
def test_the_length_stays(n):
    audio = clipped(np.sin(np.arange(n + 1) / 7).astype(np.float32), 12)[:n]
    assert declip(audio).shape == (n,) and condition(audio, RATE).shape == (n,)


def test_loud_speech_passes_as_it_is(takes):
    for audio in takes:
        assert condition(audio, RATE) is audio


@pytest.mark.parametrize("db", [-20, -40, -55])
def test_quiet_speech_is_raised_to_one_level(takes, db):
    raised = condition(gained(takes[0], db), RATE)
    frames = raised[: len(raised) // 400 * 400].reshape(-1, 400)
    assert 10 * np.log10((frames**2).mean(axis=1).max()) == pytest.approx(LOUDEST_DB, abs=0.01)


def test_an_offset_is_taken_away(takes):
    audio = takes[0] - takes[0].mean()
    np.testing.assert_allclose(condition(audio + np.float32(0.2), RATE), audio, atol=1e-6)
