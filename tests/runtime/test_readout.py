"""The readout: CTC's collapse and the merging of similar neighbours."""

import itertools

import numpy as np
import pytest

from tiny_align.runtime.readout import collapse, ctc_scale, merge_similar

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((6, 32)).astype(np.float32)
SCALE = ctc_scale(TABLE)
BLANK = None


def frames_of(path, scale=3.0):
    """(N, D + 1) frames of a path of tokens and blanks."""
    rows = []
    for token in path:
        vector = np.zeros(32) if token is BLANK else scale * TABLE[token]
        blank_logit = 9.0 if token is BLANK else 0.0
        rows.append(np.append(vector, blank_logit))
    return np.array(rows, np.float32)


def nearest(soft_tokens):
    return [int(((s - TABLE) ** 2).sum(axis=1).argmin()) for s in soft_tokens]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_becomes_one_soft_token_and_blanks_none(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 7, size=30).repeat(rng.integers(1, 4))
    path = [BLANK if token == 6 else int(token) for token in tokens]
    runs = [token for token, _ in itertools.groupby(path) if token is not BLANK]
    assert nearest(collapse(frames_of(path), TABLE, SCALE)) == runs


def test_a_blank_between_keeps_two_of_the_same():
    assert nearest(collapse(frames_of([2, 2, BLANK, 2]), TABLE, SCALE)) == [2, 2]


def test_a_certain_frame_gives_the_embedding_of_its_token():
    np.testing.assert_allclose(
        collapse(frames_of([4, 4], scale=20), TABLE, SCALE)[0], TABLE[4], atol=1e-3
    )


def test_a_doubtful_frame_gives_a_mixture():
    doubtful = frames_of([1]) * 0.5 + frames_of([3]) * 0.5
    doubtful[:, -1] = -9
    soft_token = collapse(doubtful, TABLE, SCALE)[0]
    assert min(np.abs(soft_token - TABLE[1]).max(), np.abs(soft_token - TABLE[3]).max()) > 0.1


@pytest.mark.parametrize(
    ("path", "n_soft_tokens"), [([1], 0), ([1, BLANK, 4], 0), ([1, BLANK, 4, BLANK, 2], 3)]
)
def test_one_or_two_doubtful_words_are_a_noise(path, n_soft_tokens):
    """Three doubtful words are kept: each may be wrong, but they are speech."""
    frames = frames_of(path)
    for frame, token in zip(frames, path):
        if token is not BLANK:
            logits = frame[:-1] @ TABLE.T * SCALE
            frame[-1] = np.log(np.exp(logits).sum()) - 0.1  # the blank is about as likely
            assert SCALE * (frame[:-1] @ TABLE[token]) > frame[-1]
    assert len(collapse(frames, TABLE, SCALE)) == n_soft_tokens


@pytest.mark.parametrize("path", [[], [BLANK], [BLANK] * 5])
def test_blanks_alone_give_no_soft_token(path):
    frames = frames_of(path).reshape(len(path), 33)
    soft_tokens = collapse(frames, TABLE, SCALE)
    assert soft_tokens.shape == (0, 32) and soft_tokens.dtype == np.float32


def test_similar_neighbours_become_their_mean():
    a = np.array([1, 0, 0], np.float32)
    b = np.array([0, 1, 0], np.float32)
    merged = merge_similar(np.stack([a, a * 3, b, a]), 0.9)
    np.testing.assert_allclose(merged, [[2, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert merged.dtype == np.float32
    assert merge_similar(np.stack([a, a]), None).shape == (2, 3)
