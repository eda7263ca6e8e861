"""Clipping, an offset and a low level are undone; speech without them is unchanged."""

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
def recordings(voice_path):
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    return [read_audio(voice_path / row["file_name"], RATE) for row in rows[::10]]


def with_gain(audio, db):
    return audio * np.float32(10 ** (db / 20))


def clipped(audio, db):
    return np.clip(with_gain(audio / np.abs(audio).max(initial=1e-9), db), -1, 1)


def quality_db(audio, original):
    """Signal-to-distortion ratio, whatever the level: higher is closer."""
    scale = np.dot(audio, original) / np.dot(audio, audio)
    return 10 * np.log10(np.sum(original**2) / np.sum((scale * audio - original) ** 2))


@pytest.mark.parametrize(("db", "min_gain_db"), [(6, 6), (12, 4)])
def test_declipped_speech_is_closer_to_the_original(recordings, db, min_gain_db):
    for original in recordings[:3]:
        damaged = clipped(original, db)
        assert quality_db(declip(damaged), original) > quality_db(damaged, original) + min_gain_db
        assert np.abs(declip(damaged)).max() <= 1


def test_speech_resampled_after_clipping_is_closer_to_the_original(recordings):
    original = recordings[0]
    high = soxr.resample(original, RATE, 44_100)
    damaged = soxr.resample(clipped(high, 12), 44_100, RATE)
    assert quality_db(declip(damaged), original) > quality_db(damaged, original) + 4


def test_speech_clipped_on_one_side_is_closer_to_the_original(recordings):
    damaged = np.minimum(recordings[0], 0.3 * recordings[0].max())
    above, below = clipping(damaged)
    assert above < np.inf and below == np.inf
    assert quality_db(declip(damaged), recordings[0]) > quality_db(damaged, recordings[0]) + 4


def test_speech_and_noise_without_clipping_are_returned_as_they_are(recordings):
    noises = [non_speech(np.random.default_rng(seed), RATE) for seed in range(5)]
    for audio in [
        *recordings,
        np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32),
        np.zeros(RATE, np.float32),
    ]:
        assert declip(audio) is audio
    assert all(np.isfinite(declip(audio)).all() for audio in noises)


@pytest.mark.parametrize("n", [0, 1, 100, 767, 769])
def test_the_length_is_unchanged(n):
    audio = clipped(np.sin(np.arange(n + 1) / 7).astype(np.float32), 12)[:n]
    assert declip(audio).shape == (n,) and condition(audio, RATE).shape == (n,)


def test_loud_speech_is_returned_as_it_is(recordings):
    for audio in recordings:
        assert condition(audio, RATE) is audio


@pytest.mark.parametrize("db", [-20, -40, -55])
def test_quiet_speech_is_raised_to_the_same_level(recordings, db):
    raised = condition(with_gain(recordings[0], db), RATE)
    frames = raised[: len(raised) // 400 * 400].reshape(-1, 400)
    assert 10 * np.log10((frames**2).mean(axis=1).max()) == pytest.approx(LOUDEST_DB, abs=0.01)


def test_an_offset_is_removed(recordings):
    audio = recordings[0] - recordings[0].mean()
    np.testing.assert_allclose(condition(audio + np.float32(0.2), RATE), audio, atol=1e-6)
