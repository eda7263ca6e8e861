"""How speech is cut for the encoder: every moment once, wherever the pieces of a stream end."""

import numpy as np
import pytest

from tiny_align.runtime.windows import Cutter, WindowSpec, cut

SPEC = WindowSpec(n_vectors=10, margin=2, vector_samples=4, n_features=20)


def vectors_of(windows):
    """What a projector would give that says at which sample each vector begins, cut as the windows say."""
    kept = [window[:: SPEC.vector_samples][which] for window, which in windows]
    return np.concatenate(kept).astype(int).tolist()


@pytest.mark.parametrize("n", [1, 7, 39, 40, 41, 63, 64, 65, 88, 89, 500])
def test_every_vector_of_an_utterance_is_kept_once(n):
    windows = cut(np.arange(n, dtype=np.float32), SPEC)
    assert vectors_of(windows) == list(range(0, n, SPEC.vector_samples))
    assert (
        all(len(window) == SPEC.samples for window, _ in windows[:-1])
        and len(windows[-1][0]) <= SPEC.samples
    )


def test_a_cut_is_seen_from_both_sides():
    """Around every cut each side has at least the margin of samples more than what it gives."""
    (one, first), (other, last) = cut(np.arange(60, dtype=np.float32), SPEC)
    assert one[-1] - one[:: SPEC.vector_samples][first][-1] >= SPEC.margin * SPEC.vector_samples
    assert other[:: SPEC.vector_samples][last][0] - other[0] == SPEC.margin * SPEC.vector_samples


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_size_give_the_same_windows(seed):
    rng = np.random.default_rng(seed)
    audio = rng.standard_normal(rng.integers(1, 400)).astype(np.float32)
    cutter = Cutter(SPEC)
    pieces = np.split(audio, np.sort(rng.integers(0, len(audio), rng.integers(0, 30))))
    got = [*(window for piece in pieces for window in cutter.push(piece)), *cutter.finish()]
    for (ours, kept), (whole, wanted) in zip(got, cut(audio, SPEC), strict=True):
        np.testing.assert_array_equal(ours, whole)
        assert kept == wanted


def test_without_windows_speech_is_not_cut():
    ((window, kept),) = cut(np.arange(1000, dtype=np.float32), None)
    assert len(window) == 1000 and kept == slice(None)


def test_features_are_split_as_they_were_made():
    features = np.arange(50)[:, None]
    assert [len(part) for part in SPEC.split(features)] == [20, 20, 10]
    assert [len(part) for part in SPEC.split(features[:40])] == [20, 20]


def test_a_window_that_would_keep_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot lose 5 at both ends"):
        WindowSpec(n_vectors=10, margin=5, vector_samples=4, n_features=20)
