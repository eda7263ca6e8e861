"""Rehearsal data is read as it was written, to float16, and non-speech is added to it."""

import numpy as np
import pytest

from tiny_align.align.data.examples import Example
from tiny_align.align.data.rehearsal import (
    N_NON_SPEECH,
    read_rehearsal,
    rehearsal_examples,
    write_rehearsal,
)
from tiny_align.runtime.errors import BundleError


def examples():
    rng = np.random.default_rng(0)
    made = []
    for n_frames, tokens in ((5, [3, 1, 3]), (9, []), (2, [7])):
        features = rng.standard_normal((n_frames, 4)).astype(np.float32)
        made.append(Example(features, tokens, [4] * len(tokens)))
    return made


def test_written_examples_are_read_back(tmp_path):
    write_rehearsal(tmp_path / "replay.npz", examples())
    got = read_rehearsal(tmp_path / "replay.npz")
    assert [e.tokens for e in got] == [[3, 1, 3], [], [7]]
    assert [e.token_lengths for e in got] == [[4, 4, 4], [], [4]]
    for example, written in zip(got, examples(), strict=True):
        assert example.features.dtype == np.float32
        np.testing.assert_allclose(example.features, written.features, atol=2e-3)


def test_a_bundle_without_rehearsal_data_gives_no_examples(tmp_path):
    assert read_rehearsal(tmp_path / "replay.npz") == []


def test_ctc_rehearses_the_shipped_examples_and_more_non_speech(assistant, tmp_path):
    rehearsal = rehearsal_examples(assistant, "ctc", tmp_path)
    n_spoken = sum(bool(example.tokens) for example in rehearsal)
    assert len(rehearsal) - n_spoken == 64 + N_NON_SPEECH and n_spoken >= 50


def test_a_pooled_objective_rehearses_no_non_speech(assistant, tmp_path):
    assert all(e.tokens for e in rehearsal_examples(assistant, "aligned", tmp_path))


def test_without_rehearsal_data_only_non_speech_is_rehearsed(assistant, monkeypatch, tmp_path):
    missing = property(lambda _: tmp_path / "replay.npz")
    monkeypatch.setattr(type(assistant.bundle), "replay", missing)
    rehearsal = rehearsal_examples(assistant, "ctc", tmp_path)
    assert [example.tokens for example in rehearsal] == [[]] * N_NON_SPEECH
    assert rehearsal_examples(assistant, "aligned", tmp_path) == []


DAMAGES = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"garbage", lambda b: bytes(99)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error(tmp_path, damage):
    path = tmp_path / "replay.npz"
    write_rehearsal(path, examples())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"replay\.npz is damaged \(.*copy the bundle again"):
        read_rehearsal(path)


def test_a_file_without_tokens_is_an_error(tmp_path):
    np.savez(tmp_path / "replay.npz", features=np.zeros((3, 2)))
    with pytest.raises(BundleError, match=r"replay\.npz is damaged \("):
        read_rehearsal(tmp_path / "replay.npz")
