"""From the projector's output to soft tokens: CTC's collapse and the merging of alike neighbours."""

import itertools

import numpy as np
import pytest

from tiny_align.runtime.readout import collapse, ctc_scale, merge_similar

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((6, 32)).astype(np.float32)
SCALE = ctc_scale(TABLE)
BLANK = None


def frames_of(path, sure=3.0):
    """(N, D + 1) frames that say `path`, tokens and blanks."""
    rows = [
        np.append(np.zeros(32) if t is BLANK else sure * TABLE[t], 9.0 if t is BLANK else 0.0)
        for t in path
    ]
    return np.array(rows, np.float32)


def nearest(soft_tokens):
    return [int(((s - TABLE) ** 2).sum(axis=1).argmin()) for s in soft_tokens]


@pytest.mark.parametrize("seed", range(20))
def test_runs_become_one_soft_token_each_and_blanks_none(seed):
    rng = np.random.default_rng(seed)
    path = [
        BLANK if t == 6 else int(t) for t in rng.integers(0, 7, size=30).repeat(rng.integers(1, 4))
    ]
    said = [t for t, _ in itertools.groupby(path) if t is not BLANK]
    assert nearest(collapse(frames_of(path), TABLE, SCALE)) == said


def test_a_blank_between_keeps_two_of_the_same():
    assert nearest(collapse(frames_of([2, 2, BLANK, 2]), TABLE, SCALE)) == [2, 2]


def test_a_sure_frame_gives_the_token_s_own_embedding():
    np.testing.assert_allclose(
        collapse(frames_of([4, 4], sure=20), TABLE, SCALE)[0], TABLE[4], atol=1e-3
    )


def test_a_doubtful_frame_gives_a_mixture():
    doubtful = frames_of([1]) * 0.5 + frames_of([3]) * 0.5
    doubtful[:, -1] = -9
    soft_token = collapse(doubtful, TABLE, SCALE)[0]
    assert min(np.abs(soft_token - TABLE[1]).max(), np.abs(soft_token - TABLE[3]).max()) > 0.1


@pytest.mark.parametrize(
    ("path", "kept"), [([1], 0), ([1, BLANK, 4], 0), ([1, BLANK, 4, BLANK, 2], 3)]
)
def test_a_doubtful_word_alone_is_a_noise(path, kept):
    """Of three doubtful words each may be wrong, but something was said."""
    frames = frames_of(path)
    for frame, token in zip(frames, path):
        if token is not BLANK:
            frame[-1] = (
                np.log(np.exp(frame[:-1] @ TABLE.T * SCALE).sum()) - 0.1
            )  # the blank is as likely
            assert SCALE * (frame[:-1] @ TABLE[token]) > frame[-1]
    assert len(collapse(frames, TABLE, SCALE)) == kept


@pytest.mark.parametrize("path", [[], [BLANK], [BLANK] * 5])
def test_nothing_said_is_no_soft_token(path):
    frames = frames_of(path).reshape(len(path), 33)
    soft_tokens = collapse(frames, TABLE, SCALE)
    assert soft_tokens.shape == (0, 32) and soft_tokens.dtype == np.float32


def test_neighbours_that_are_alike_become_their_mean():
    a, b = np.array([1, 0, 0.0], np.float32), np.array([0, 1, 0.0], np.float32)
    merged = merge_similar(np.stack([a, a * 3, b, a]), 0.9)
    np.testing.assert_allclose(merged, [[2, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert merged.dtype == np.float32
    assert merge_similar(np.stack([a, a]), None).shape == (2, 3)
