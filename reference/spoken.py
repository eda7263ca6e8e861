"""The speech that the encoder and the general projector are trained on: synthesised once, stored as
log-mel.

Three quarters are espeak-ng's, in hundreds of random voices a shard; the rest is flite's. Other
processes synthesise while the training uses the shards that are complete. Every batch is augmented
anew (augment.py).
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np

from tiny_align.reference import corpus
from tiny_align.runtime.front_ends.nemo import NemoMel

FRONT_END = NemoMel(floor_db=60.0, speech_share=0.2)
SHARD = 500  # recordings
# one shard in so many is flite's; each of the others has 200 random espeak-ng voices of its own
FLITE_EVERY = 4
HALTING = 0.4  # share of the recordings with pauses between the words
ENOUGH = 16  # shards before a training begins


def texts_to_say(n: int, seed: int) -> list[str]:
    """About `n`: corpus sentences, and loose words and digits so that the encoder cannot guess."""
    rng = random.Random(seed)
    words = sorted({w for s in corpus.sentences(20_000, 0, unique=False) for w in s.text.split()})
    texts = []
    for s in corpus.sentences(n, seed, unique=False):
        kind = rng.random()
        if kind < 0.22:
            texts.append(" ".join(rng.choice(words) for _ in range(rng.randint(2, 8))))
        elif kind < 0.32:
            texts.append(" ".join(rng.choice(corpus.DIGITS) for _ in range(rng.randint(1, 7))))
        else:
            texts.append(s.text)
    return [
        text for text in texts if not corpus.is_held_out(text)
    ]  # loose digits may be a test sentence


def speak_shard(shard: int, path: Path) -> None:
    """Synthesise SHARD recordings.

    `path`, (frames of all, M) float16, and beside it their texts and lengths.
    """
    from tiny_align.reference.speech import Espeak, Flite

    rng = random.Random(1000 + shard)
    synthesiser = Flite() if shard % FLITE_EVERY == FLITE_EVERY - 1 else Espeak(seed=shard)
    texts, mels = texts_to_say(SHARD, 100 + shard), []
    for text in texts:
        say = synthesiser.say_haltingly if rng.random() < HALTING else synthesiser.say_randomly
        mels.append(FRONT_END.log_mel(say(text, rng)).astype(np.float16))
    np.save(path.with_suffix(".partial.npy"), np.concatenate(mels))
    path.with_suffix(".json").write_text(
        json.dumps({"texts": texts, "frames": [len(m) for m in mels]})
    )
    path.with_suffix(".partial.npy").rename(path)


def shards_of(work: Path, n: int) -> list[Path]:
    """The shard files of `n` recordings, synthesised or not."""
    return [work / f"spoken{i}.npy" for i in range(-(-n // SHARD))]


def read_shard(path: Path) -> list[tuple[np.ndarray, str]]:
    """A shard's recordings as (log-mel (T, M) float16, text)."""
    meta, mels = (
        json.loads(path.with_suffix(".json").read_text()),
        np.load(path, mmap_mode="r", allow_pickle=False),
    )
    edges = np.cumsum([0, *meta["frames"]])
    return [(mels[a:b], text) for a, b, text in zip(edges, edges[1:], meta["texts"])]


def speak(work: Path, n: int, workers: int | None = None):
    """Synthesise the missing shards of `n` recordings in other processes.

    `.get()` of the result waits for them.
    """
    work.mkdir(parents=True, exist_ok=True)
    missing = [(i, path) for i, path in enumerate(shards_of(work, n)) if not path.exists()]
    pool = multiprocessing.get_context("spawn").Pool(workers or os.cpu_count(), maxtasksperchild=1)
    result = pool.starmap_async(speak_shard, missing, chunksize=1)  # one synthesiser per process
    pool.close()
    return result


class Spoken:
    """The recordings synthesised so far, on `device`, in batches of similar length.

    Args:
        work: where the shards lie; those missing of `n` recordings are synthesised meanwhile, on
            two cores of three.
        encode: a text -> what `batch` gives for it.
    """

    def __init__(self, work: Path, n: int, encode, device="cpu"):
        self._waiting, self._encode, self._device = shards_of(work, n), encode, device
        self._speaking = speak(work, n, max(1, os.cpu_count() * 2 // 3))
        self._frames, self._lengths, self.targets = [], [], []
        n_pending = len(self._waiting) - min(ENOUGH, len(self._waiting))
        while self.take_in() > n_pending:
            time.sleep(0.5)

    def __len__(self) -> int:
        return len(self.targets)

    def take_in(self) -> int:
        """Load the shards that have become ready; returns how many are still missing."""
        import torch

        if self._speaking.ready():
            self._speaking.get()  # raises what a process raised
        ready = [path for path in self._waiting if path.exists()]
        for path in ready:
            meta = json.loads(path.with_suffix(".json").read_text())
            self._frames.append(
                torch.from_numpy(np.load(path, allow_pickle=False)).to(self._device)
            )
            self._lengths.append(torch.tensor(meta["frames"], device=self._device))
            self.targets += [self._encode(text) for text in meta["texts"]]
            self._waiting.remove(path)
        if ready:
            self._lengths, self._frames = [torch.cat(self._lengths)], [torch.cat(self._frames)]
            self._starts = torch.cumsum(self._lengths[0], 0) - self._lengths[0]
            self._order = torch.argsort(self._lengths[0], stable=True)
        return len(self._waiting)

    def batch(self, rng: random.Random, frames: int):
        """(B, T, M) float32 log-mel, padded, of about `frames` in all, (B,) frame counts, and the
        targets.
        """
        import torch

        start = rng.randrange(len(self))
        size = frames // int(self._lengths[0][self._order[start]])
        start = max(0, min(start, len(self) - size))
        chosen = self._order[start : start + size]
        lengths = self._lengths[0][chosen]
        places = torch.arange(int(lengths.max()), device=self._device)
        inside = places < lengths[:, None]
        rows = (self._starts[chosen][:, None] + places).clamp(max=len(self._frames[0]) - 1)
        mels = self._frames[0][rows].float() * inside[..., None]
        return mels, lengths, [self.targets[i] for i in chosen.tolist()]
