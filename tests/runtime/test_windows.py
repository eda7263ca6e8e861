"""How speech is cut for the encoder: every moment once, wherever the chunks of a stream end."""

import numpy as np
import pytest

from tiny_align.runtime.windows import Cutter, WindowSpec, cut

SPEC = WindowSpec(n_vectors=10, margin=2, vector_samples=4, n_features=20)


def vectors_of(windows):
    """The samples at which the remaining vectors begin, of audio whose values count its samples."""
    remaining = [audio[:: SPEC.vector_samples][keep] for audio, keep in windows]
    return np.concatenate(remaining).astype(int).tolist()


@pytest.mark.parametrize("n", [1, 7, 39, 40, 41, 63, 64, 65, 88, 89, 500])
def test_every_vector_of_an_utterance_remains_once(n):
    windows = cut(np.arange(n, dtype=np.float32), SPEC)
    assert vectors_of(windows) == list(range(0, n, SPEC.vector_samples))
    assert all(len(audio) == SPEC.samples for audio, _ in windows[:-1])
    assert len(windows[-1][0]) <= SPEC.samples


def test_both_sides_of_a_cut_have_a_margin():
    """Each window has at least the margin of samples beyond the vectors that remain of it."""
    (first, first_keep), (last, last_keep) = cut(np.arange(60, dtype=np.float32), SPEC)
    margin = SPEC.margin * SPEC.vector_samples
    assert first[-1] - first[:: SPEC.vector_samples][first_keep][-1] >= margin
    assert last[:: SPEC.vector_samples][last_keep][0] - last[0] == margin


@pytest.mark.parametrize("seed", range(20))
def test_chunks_of_any_size_give_the_same_windows(seed):
    rng = np.random.default_rng(seed)
    audio = rng.standard_normal(rng.integers(1, 400)).astype(np.float32)
    cutter = Cutter(SPEC)
    windows = []
    for chunk in np.split(audio, np.sort(rng.integers(0, len(audio), rng.integers(0, 30)))):
        windows += cutter.push(chunk)
    windows += cutter.finish()
    for (got, got_keep), (want, want_keep) in zip(windows, cut(audio, SPEC), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got_keep == want_keep


def test_without_windows_speech_is_not_cut():
    ((window, keep),) = cut(np.arange(1000, dtype=np.float32), None)
    assert len(window) == 1000 and keep == slice(None)


def test_features_are_split_by_window():
    features = np.arange(50)[:, None]
    assert [len(part) for part in SPEC.split(features)] == [20, 20, 10]
    assert [len(part) for part in SPEC.split(features[:40])] == [20, 20]


def test_margins_as_long_as_the_window_are_refused():
    with pytest.raises(ValueError, match="cannot lose 5 at both ends"):
        WindowSpec(n_vectors=10, margin=5, vector_samples=4, n_features=20)
