"""runtime/front_ends/nemo.py against transformers' ParakeetFeatureExtractor."""

import numpy as np
import pytest

from tiny_align.runtime.front_ends.nemo import NemoMel

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
    ours = NemoMel(n_mels=n_mels, floor_db=None)(audio)
    theirs = reference(audio, n_mels)
    assert ours.shape == theirs.shape == (len(audio) // NemoMel().hop_samples, n_mels)
    assert ours.dtype == np.float32
    difference = np.abs(ours - theirs)
    assert difference.max() < TOLERANCE, f"max {difference.max():.2g}, mean {difference.mean():.2g}"


@pytest.mark.parametrize("n_mels", [80, 128])
def test_real_speech_equals_transformers(speech, n_mels):
    assert_same(speech, n_mels)


@pytest.mark.parametrize("n_samples", [1_600, 3_999, 16_000, 16_001, 16_159, 59_999])
def test_noise_of_any_length_equals_transformers(n_samples):
    assert_same(noise(n_samples), 80)


def test_each_bin_has_zero_mean_and_unit_variance(speech):
    features = NemoMel()(speech)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(axis=0, ddof=1), 1, atol=1e-2)


def test_the_floor_is_relative_to_the_loudest_level():
    log_mel = np.array([[0.0, -2.0], [-30.0, -10.0]], np.float32)
    raised = NemoMel(floor_db=60.0).raise_to_floor(log_mel)
    expected = np.maximum(log_mel, -6 * np.log(10))  # 60 dB in nepers of power
    np.testing.assert_allclose(raised, expected, rtol=1e-6)
    np.testing.assert_array_equal(NemoMel(floor_db=None).raise_to_floor(log_mel), log_mel)


def test_speech_share_makes_speech_independent_of_the_silence_around_it(speech):
    pause = (1e-4 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    amid_pauses = np.concatenate([pause, speech, pause, pause])

    def mean_difference(front_end):
        """Of the speech's frames, alone and amid pauses."""
        alone = front_end(speech)
        n_before = RATE // front_end.hop_samples
        within = front_end(amid_pauses)[n_before : n_before + len(alone)]
        return np.abs(within - alone).mean()

    assert mean_difference(NemoMel(floor_db=60.0, speech_share=0.2)) < 0.1
    assert mean_difference(NemoMel(floor_db=60.0)) > 0.1


@pytest.mark.parametrize("n_frames", [2, 10, 30, 333])
def test_training_normalises_a_padded_batch_like_the_runtime(n_frames):
    torch = pytest.importorskip("torch")
    from tiny_align.reference.augment import normalise

    front_end = NemoMel(floor_db=60.0, speech_share=0.2)
    rng = np.random.default_rng(n_frames)
    log_mel = rng.normal(-5, 2, (n_frames, 80)).astype(np.float32)
    log_mel[: n_frames // 3] -= 8
    padded = torch.nn.functional.pad(torch.from_numpy(log_mel), (0, 0, 0, 50))
    lengths = torch.tensor([n_frames, n_frames])
    batch = normalise(torch.stack([padded, padded.flip(1)]), lengths, front_end)
    np.testing.assert_allclose(batch[0, :n_frames].numpy(), front_end.finish(log_mel), atol=1e-4)
    assert not batch[:, n_frames:].any()
