"""What a bundle ships of other people comes back as it was written, to float16."""

import numpy as np
import pytest

from tiny_align.align.commands.align import SOUNDS, rehearsal_examples
from tiny_align.align.data.examples import Example
from tiny_align.align.data.rehearsal import read_rehearsal, write_rehearsal
from tiny_align.runtime.errors import BundleError


def examples():
    rng, tokens = np.random.default_rng(0), ([3, 1, 3], [], [7])
    return [
        Example(rng.standard_normal((n, 4)).astype(np.float32), t, [4] * len(t))
        for n, t in zip((5, 9, 2), tokens)
    ]


def test_what_was_written_is_read(tmp_path):
    write_rehearsal(tmp_path / "replay.npz", examples())
    got = read_rehearsal(tmp_path / "replay.npz")
    assert [e.tokens for e in got] == [[3, 1, 3], [], [7]]
    assert [e.token_lengths for e in got] == [[4, 4, 4], [], [4]]
    for ours, theirs in zip(got, examples(), strict=True):
        assert ours.features.dtype == np.float32
        np.testing.assert_allclose(ours.features, theirs.features, atol=2e-3)


def test_a_bundle_without_replay_has_none(tmp_path):
    assert read_rehearsal(tmp_path / "replay.npz") == []


def test_beside_the_people_and_sounds_that_the_reference_bundle_ships_others_are_made(
    assistant, tmp_path
):
    company = rehearsal_examples(assistant, "ctc", tmp_path)
    assert (
        sum(not e.tokens for e in company) == 64 + SOUNDS
        and sum(bool(e.tokens) for e in company) >= 50
    )
    assert all(e.tokens for e in rehearsal_examples(assistant, "aligned", tmp_path))


def test_without_replay_the_company_is_sounds_without_a_word(assistant, monkeypatch, tmp_path):
    monkeypatch.setattr(
        type(assistant.bundle), "replay", property(lambda _: tmp_path / "replay.npz")
    )
    assert [e.tokens for e in rehearsal_examples(assistant, "ctc", tmp_path)] == [[]] * SOUNDS
    assert rehearsal_examples(assistant, "aligned", tmp_path) == []


DAMAGES = [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"garbage", lambda b: bytes(99)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    path = tmp_path / "replay.npz"
    write_rehearsal(path, examples())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"replay\.npz is damaged \(.*copy the bundle again"):
        read_rehearsal(path)


def test_a_file_without_its_tokens_is_one_sentence(tmp_path):
    np.savez(tmp_path / "replay.npz", features=np.zeros((3, 2)))
    with pytest.raises(BundleError, match=r"replay\.npz is damaged \("):
        read_rehearsal(tmp_path / "replay.npz")
