"""Trains the bundle's general projector on many synthetic voices and puts it into the bundle.

The features come from the bundle's own encoder graph, over augmented speech of the voices the encoder
was trained on; flite's voices and people are not among them.

    python -m tiny_align.reference.projector --bundle reference/bundle --out reference/weights/projector.safetensors
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.reference.encoder import N_SPEECH, speak
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle import Bundle, write_manifest

CHUNK = 32  # recordings augmented together
REPLAYED = 64  # utterances whose features the bundle keeps for the training of a person


def spoken_features(assistant: Assistant, work: Path, n: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """`n` recordings of the encoder's training, augmented anew -> encoder features (N, Da) and texts."""
    manifest = assistant.bundle.manifest
    encoder = manifest.files[manifest.graphs["encoder"].file + ".data"][:12]  # another encoder, other features
    path = work / f"features-{encoder}-{n}-{seed}.npz"
    if not path.exists():
        features, texts = _speak(assistant, work, n, seed)
        edges = np.cumsum([0, *map(len, features)])
        work.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".partial.npz"), features=np.concatenate(features), edges=edges, texts=texts)
        path.with_suffix(".partial.npz").rename(path)
    stored = np.load(path)
    everything, edges = stored["features"], stored["edges"]
    return [everything[a:b] for a, b in zip(edges, edges[1:])], [str(t) for t in stored["texts"]]


def _speak(assistant: Assistant, work: Path, n: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    import torch

    from tiny_align.reference.augment import augment

    items = speak(work, N_SPEECH)
    items = [items[i] for i in random.Random(seed).sample(range(len(items)), n)]
    front, features = assistant.bundle.manifest.front_end, []
    torch.manual_seed(seed)
    for start in tqdm(range(0, n, CHUNK), desc="encode"):
        mels = [torch.from_numpy(mel.astype(np.float32)) for mel, _ in items[start : start + CHUNK]]
        lengths = torch.tensor([len(m) for m in mels])
        padded, lengths = augment(torch.nn.utils.rnn.pad_sequence(mels, batch_first=True), lengths)
        features += [assistant.encode(front.finish(mel[:count])) for mel, count in zip(padded.numpy(), lengths)]
    return features, [text for _, text in items]


def train(bundle_path: Path, out: Path, work: Path, n: int, steps: int, seed: int, objective: str) -> dict:
    from safetensors.torch import save_file

    from tiny_align.align.objectives import make
    from tiny_align.align.personalise import SILENCES, embedding_table, make_example, quiet_examples
    from tiny_align.align.replay import write_replay
    from tiny_align.align.train import Trainer, TrainOptions
    from tiny_align.align.users import data_file, load_projector, write_weights

    bundle = Bundle.open(bundle_path)
    options = TrainOptions(
        objective=objective,
        parts=(),
        flat_start=500,
        steps=steps,
        batch=28,
        company=4,
        rate=1e-3,
        weight_decay=1e-2,
        warmup=100,
        seed=seed,
        held_out=0.03,
        check_every=200,
        max_seconds=float("inf"),
    )
    state = work / f"projector-{objective}"
    with Assistant.load(bundle) as assistant:
        features, texts = spoken_features(assistant, work, n, seed)
        examples = [make_example(assistant.llm, t, f) for f, t in zip(features, texts)]
        projector = load_projector(bundle, bundle.graph("projector"))
        target = make(options, embedding_table(assistant), bundle.manifest.readout.scale)
        silence = quiet_examples(assistant, n // 8, seed)
        trained = Trainer(projector, examples, target, options, state, silence).run()
    save_file(trained.weights, out)
    write_replay(bundle.replay, examples[:REPLAYED] + silence[:SILENCES])
    write_weights(bundle.path / data_file(bundle), bundle.manifest, trained.weights)
    write_manifest(bundle.path, bundle.manifest)
    return trained.record


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("reference/bundle"))
    parser.add_argument("--out", type=Path, default=Path("reference/weights/projector.safetensors"))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--utterances", type=int, default=16_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", default="ctc")
    args = parser.parse_args(argv)
    record = train(args.bundle, args.out, args.work, args.utterances, args.steps, args.seed, args.objective)
    report = vars(args) | record
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(json.dumps({k: record[k] for k in ("steps", "train_seconds", "improved")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
