"""The recipe of the reference bundle, by cases with a known answer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_align.export.encoders import load_front_end
from tiny_align.reference import corpus, encoder
from tiny_align.reference.augment import gate
from tiny_align.reference.average import mean
from tiny_align.reference.speech import FOREIGN, FOREIGN_FINAL, foreign_sounds
from tiny_align.reference.spoken import FRONT_END, Spoken, read_shard

WORD = slice(20, 30)  # frames of the word in a gated recording


def gated(odds: float) -> torch.Tensor:
    """200 recordings of one word in noise, after the gate: (200, frames)."""
    clean = torch.full((200, 50, 4), 1e-9)
    clean[:, WORD] = 1.0
    return gate(clean + 1e-3, clean, odds=odds)[:, :, 0]


def test_gate_leaves_noise_around_a_word_and_nothing_beyond():
    torch.manual_seed(0)
    left = gated(odds=1.0)
    assert (left[:, 22:28] > 1).all()  # inside the word, even where the gate opens two frames late
    assert (left[:, :8] == 0).all()  # 12 frames at most
    assert (left[:, 42:] == 0).all()
    open_before = (left[:, 8:20] > 0).sum(dim=1)
    assert open_before.min() == 0
    assert open_before.max() == 12


def test_without_a_gate_the_noise_stays():
    assert (gated(odds=0.0) > 0).all()


def test_a_foreign_accent_replaces_about_the_share_of_sounds():
    rng = random.Random(0)
    n_sounds = len(FOREIGN) + len(FOREIGN_FINAL)
    accents = [foreign_sounds(rng, share=0.3) for _ in range(200)]
    mean_share = sum(map(len, accents)) / len(accents) / n_sounds
    assert abs(mean_share - 0.3) < 0.03
    assert len(foreign_sounds(rng, share=1.0)) == n_sounds


def test_a_foreign_accent_is_lines_of_replaced_sounds():
    for line in foreign_sounds(random.Random(0), share=1.0):
        keyword, final, sound, replacement = line.split()
        assert keyword == "replace"
        assert final in "01"
        assert sound in FOREIGN | FOREIGN_FINAL
        assert replacement != sound


def write_shard(path: Path, texts: list[str]) -> None:
    """A shard of noise, the k-th recording 40 + 20 k frames long."""
    frames = [40 + 20 * k for k in range(len(texts))]
    rng = np.random.default_rng(0)
    mels = rng.standard_normal((sum(frames), FRONT_END.n_mels))
    np.save(path, mels.astype(np.float16))
    path.with_suffix(".json").write_text(json.dumps({"texts": texts, "frames": frames}))


def test_a_batch_holds_whole_recordings_padded_with_zeros(tmp_path):
    texts = [corpus.DIGITS[k] for k in range(10)]
    write_shard(tmp_path / "spoken0.npy", texts)
    spoken = Spoken(tmp_path, 500, str.upper)
    written = read_shard(tmp_path / "spoken0.npy")
    assert len(spoken) == 10
    mels, lengths, targets = spoken.batch(random.Random(0), frames=400)
    assert 1 < len(targets) < 10
    for mel, length, text in zip(mels, lengths, targets):
        expected, _ = written[texts.index(text.lower())]
        assert length == len(expected)
        np.testing.assert_array_equal(mel[:length].numpy(), expected.astype(np.float32))
        assert not mel[length:].any()


def test_an_encoders_training_resumes_where_it_stopped(tmp_path):
    write_shard(tmp_path / "spoken0.npy", ["one two", "three", "four", "five six"])
    options = ["--work", str(tmp_path), "--out", str(tmp_path / "encoder"), "--device", "cpu"]
    options += ["--speech", "500", "--judged", "0", "--batch", "200", "--check-every", "1"]
    for steps in (1, 3, 3):  # the last finds nothing to do
        assert encoder.main([*options, "--steps", str(steps)]) == 0
        record = json.loads((tmp_path / "encoder/training.json").read_text())
        assert [row["step"] for row in record["log"]] == list(range(1, steps + 1))
    assert load_front_end(str(tmp_path / "encoder"), "ParakeetFeatureExtractor") == FRONT_END


def test_a_mean_of_weights_lies_between_them():
    before = {"w": torch.zeros(3), "n": torch.tensor(4)}
    after = {"w": torch.ones(3), "n": torch.tensor(7)}
    averaged = mean(before, after, share=0.6)
    assert averaged["w"].tolist() == pytest.approx([0.6] * 3)
    assert averaged["n"] == 7
