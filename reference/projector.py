"""Trains the bundle's general projector on many synthetic voices and puts it into the bundle.

The training is `tiny-align align --general`'s; what is special is its recordings: augmented speech
of the voices the encoder was trained on, made as log-mel frames. flite's new voices and humans are
not among them.

    python -m tiny_align.reference.projector --bundle reference/bundle \\
        --out reference/weights/projector.safetensors
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.reference.spoken import read_shard, shards_of, speak
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary
from tiny_align.runtime.windows import cut

CHUNK = 32  # recordings augmented together


def spoken_examples(
    assistant: Assistant, work: Path, n: int, seed: int
) -> tuple[list, SpeechVocabulary]:
    """`n` recordings of the encoder's training, augmented anew, as examples, and their vocabulary.

    They are encoded once, resumably.
    """
    from tiny_align.align.data.examples import make_examples
    from tiny_align.align.data.feature_cache import Stored, ensure_array

    speak(work, n + n // 10).get()  # held-out sentences are left out
    items = [item for path in shards_of(work, n + n // 10) for item in read_shard(path)]
    items = [items[i] for i in random.Random(seed).sample(range(len(items)), n)]
    name = f"spoken-{assistant.bundle.manifest.encoder_key[:16]}-{n}-{seed}"
    stored = []
    for start in tqdm(range(0, n, CHUNK), desc="encode"):
        chunk = items[start : start + CHUNK]
        paths = [work / name / f"{name}-{start + i}.npy" for i in range(len(chunk))]
        if not all(path.exists() for path in paths):
            for path, features in zip(
                paths, _encode(assistant, [mel for mel, _ in chunk], seed + start)
            ):
                ensure_array(path, lambda features=features: features)
        stored += [Stored(path) for path in paths]
    texts = [text for _, text in items]
    return make_examples(assistant.llm, assistant.speech_vocabulary, texts, [stored])


def _encode(assistant: Assistant, mels: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """(frames, M) each, augmented -> (N, Da) float32 each."""
    import torch

    from tiny_align.reference.augment import augment

    torch.manual_seed(seed)
    rows = [torch.from_numpy(mel.astype(np.float32)) for mel in mels]
    lengths = torch.tensor([len(r) for r in rows])
    padded, lengths = augment(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
    finish = assistant.bundle.manifest.front_end.finish
    return [
        np.concatenate(
            [assistant.encode(finish(mel[which])) for which in _windows_of(assistant, int(count))]
        )
        for mel, count in zip(padded.numpy(), lengths)
    ]


def _windows_of(assistant: Assistant, n_frames: int) -> list[np.ndarray]:
    """Which frames of a log-mel belong to each of its windows: indices."""
    spec, hop = assistant.windows, assistant.bundle.manifest.front_end.hop_samples
    in_frames = dataclasses.replace(spec, vector_samples=spec.vector_samples // hop)
    return [
        window.astype(int) for window, _ in cut(np.arange(n_frames, dtype=np.float32), in_frames)
    ]


def train(args) -> dict:
    """Train as `args` (main) asks; returns the record."""
    from safetensors.torch import save_file

    from tiny_align.align.training.align_general import train_general
    from tiny_align.align.training.limits import TrainingLimits

    limits = TrainingLimits(steps=args.steps, seed=args.seed, objective=args.objective)
    with Assistant.load(args.bundle, threads=args.threads) as assistant:
        examples, vocabulary = spoken_examples(assistant, args.work, args.utterances, args.seed)
        work = args.work / f"projector-{args.objective}"
        trained = train_general(assistant, examples, vocabulary, work, limits)
        table = assistant.bundle.manifest.embeddings_sha256
    save_file(trained.weights, args.out, {"embeddings_sha256": table})
    return trained.record


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("reference/bundle"))
    parser.add_argument("--out", type=Path, default=Path("reference/weights/projector.safetensors"))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--utterances", type=int, default=16_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, help="CPU threads of the encoder (default: all cores)"
    )
    parser.add_argument("--objective", default="ctc")
    args = parser.parse_args(argv)
    record = train(args)
    report = vars(args) | record
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(json.dumps({k: record[k] for k in ("steps", "train_seconds", "improved")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
