"""runtime/features.py against the implementation it stands in for, transformers' ParakeetFeatureExtractor."""

import numpy as np
import pytest

from tiny_align.runtime.features import FrontEnd

RATE = 16_000  # Hz
TOLERANCE = 1e-3  # of normalised features, whose standard deviation is 1


def reference(audio, n_mels):
    """(frames, n_mels) float32 as transformers computes it."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    extract = transformers.ParakeetFeatureExtractor(feature_size=n_mels)
    made = extract(audio, sampling_rate=RATE, return_tensors="pt")
    return made["input_features"][0].numpy()[: int(made["attention_mask"].sum())]


def noise(n_samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


def assert_same(audio, n_mels):
    ours, theirs = FrontEnd(n_mels=n_mels, floor_db=None, trim_share=None)(audio), reference(audio, n_mels)
    assert ours.shape == theirs.shape == (len(audio) // FrontEnd().hop_samples, n_mels)
    assert ours.dtype == np.float32
    difference = np.abs(ours - theirs)
    assert difference.max() < TOLERANCE, f"max {difference.max():.2g}, mean {difference.mean():.2g}"


@pytest.mark.parametrize("n_mels", [80, 128])
def test_real_speech_is_as_transformers_has_it(speech, n_mels):
    assert_same(speech, n_mels)


@pytest.mark.parametrize("n_samples", [1_600, 3_999, 16_000, 16_001, 16_159, 59_999])
def test_noise_of_any_length_is_as_transformers_has_it(n_samples):
    assert_same(noise(n_samples), 80)


def test_every_bin_is_normalised(speech):
    features = FrontEnd()(speech)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(axis=0, ddof=1), 1, atol=1e-2)


def test_the_floor_lies_below_the_loudest():
    log_mel = np.array([[0.0, -2.0], [-30.0, -10.0]], np.float32)
    raised = FrontEnd(floor_db=60.0).raise_to_floor(log_mel)
    np.testing.assert_allclose(raised, np.maximum(log_mel, -6 * np.log(10)), rtol=1e-6)  # 60 dB in nepers of power
    np.testing.assert_array_equal(FrontEnd(floor_db=None).raise_to_floor(log_mel), log_mel)


def test_silence_at_both_ends_is_trimmed_and_that_within_is_not(speech):
    pause = np.zeros(RATE, np.float32)
    front = FrontEnd(floor_db=60.0, trim_share=0.4)
    once, twice = (len(front(np.concatenate([pause, *parts, pause]))) for parts in ([speech], [speech, pause, speech]))
    assert once <= len(speech) // front.hop_samples + 2 * front.trim_margin_frames
    assert once < twice - RATE // front.hop_samples
    assert len(FrontEnd(trim_share=None)(np.concatenate([pause, speech]))) == (RATE + len(speech)) // front.hop_samples
