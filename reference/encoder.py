"""Trains the reference encoder: a small FastConformer (transformers' Parakeet) with CTC over letters.

Speech is synthesised once by espeak-ng in hundreds of random voices, a quarter of it by flite in a few, and kept as
log-mel (speech*.npy); every step augments it anew (augment.py). Resumable: run the same command again.

    python -m tiny_align.reference.encoder --work work --out reference/weights/encoder
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.reference import corpus
from tiny_align.runtime.features import FrontEnd

LETTERS = "abcdefghijklmnopqrstuvwxyz' "
BLANK = len(LETTERS)
FRONT_END = FrontEnd(floor_db=60.0, speech_share=0.2)
N_SPEECH = 32_000  # recordings
N_SHARDS = 8
N_FLITE_SHARDS = 2  # of these; each of the others has 200 random espeak-ng voices of its own
HALTING = 0.3  # share of the recordings with pauses between the words


def encode_letters(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def decode_letters(ids: np.ndarray) -> str:
    """(N,) best letter per frame -> text: repeats merged, blanks dropped (greedy CTC)."""
    kept = [int(a) for a, b in zip(ids, [BLANK, *ids[:-1]]) if a != b and a != BLANK]
    return "".join(LETTERS[i] for i in kept).strip()


def encoder_texts(n: int, seed: int) -> list[str]:
    """About `n`: corpus sentences, and loose words and digits so that the encoder must listen."""
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
    return [text for text in texts if not corpus.is_held_out(text)]  # loose digits may be a test sentence


def save_front_end(out: Path) -> None:
    """preprocessor_config.json, as transformers' ParakeetFeatureExtractor has it, and what our front end adds."""
    from transformers import ParakeetFeatureExtractor

    ours = {name: getattr(FRONT_END, name) for name in ("floor_db", "speech_share")}
    value = ParakeetFeatureExtractor(feature_size=FRONT_END.n_mels).to_dict() | ours
    (out / "preprocessor_config.json").write_text(json.dumps(value, indent=1) + "\n")


def _speak_shard(job: tuple[int, int, Path]) -> None:
    shard, n, path = job
    from tiny_align.reference.speech import Espeak, Flite

    rng = random.Random(1000 + shard)
    people = Flite() if shard >= N_SHARDS - N_FLITE_SHARDS else Espeak(seed=shard)
    texts, mels = encoder_texts(n, 100 + shard), []
    for text in tqdm(texts, disable=shard > 0):
        say = people.say_haltingly if rng.random() < HALTING else people.say_as_someone
        mels.append(FRONT_END.log_mel(say(text, rng)).astype(np.float16))
    np.save(path.with_suffix(".partial.npy"), np.concatenate(mels))
    path.with_suffix(".json").write_text(json.dumps({"texts": texts, "frames": [len(m) for m in mels]}))
    path.with_suffix(".partial.npy").rename(path)


def speak(work: Path, n: int) -> list[tuple[np.ndarray, str]]:
    """The training speech as (log-mel (T, M) float16, text), synthesised unless it lies in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(i, n // N_SHARDS, work / f"speech{i}-{n}.npy") for i in range(N_SHARDS)]
    with multiprocessing.Pool(os.cpu_count(), maxtasksperchild=1) as pool:  # one synthesiser per process
        pool.map(_speak_shard, [job for job in jobs if not job[2].exists()], chunksize=1)
    out = []
    for _, _, path in jobs:
        meta, mels = json.loads(path.with_suffix(".json").read_text()), np.load(path, mmap_mode="r")
        edges = np.cumsum([0, *meta["frames"]])
        out += [(mels[a:b], t) for a, b, t in zip(edges, edges[1:], meta["texts"])]
    return out


def build_model():
    """ParakeetForCTC, 3.9 M parameters, one frame per 40 ms."""
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    return ParakeetForCTC(
        ParakeetCTCConfig(
            vocab_size=len(LETTERS) + 1,
            pad_token_id=BLANK,
            encoder_config={
                "hidden_size": 176,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "intermediate_size": 528,
                "conv_kernel_size": 9,
                "subsampling_factor": 4,
                "subsampling_conv_channels": 32,
                "num_mel_bins": FRONT_END.n_mels,
                "dropout": 0.0,
                "activation_dropout": 0.0,
                "attention_dropout": 0.0,
                "layerdrop": 0.0,
                "scale_input": False,
                "max_position_embeddings": 1500,
            },
        )
    )


def _shifted_depthwise(conv, x):
    """A depthwise convolution as shifted products of the input's phases: same result, a backward pass 5x faster here.

    The input is first split into `step` x `step` phases, so that what a shift leaves out stays small.
    """
    import torch.nn.functional as F

    (rows, columns), (step, _), (pad, _) = conv.kernel_size, conv.stride, conv.padding
    height, width = ((n + 2 * pad - k) // step + 1 for n, k in zip(x.shape[2:], conv.kernel_size))
    x = F.pad(x, (pad, pad + -(x.shape[3] + 2 * pad) % step, pad, pad + -(x.shape[2] + 2 * pad) % step))
    b, c, h, w = x.shape
    phases = x.view(b, c, h // step, step, w // step, step).permute(3, 5, 0, 1, 2, 4).flatten(0, 1).unbind()
    out = conv.bias[:, None, None]
    for i in range(rows):
        for j in range(columns):
            phase, top, left = phases[i % step * step + j % step], i // step, j // step
            out = out + phase[:, :, top : top + height, left : left + width] * conv.weight[:, :, i, j, None]
    return out


def _speed_up(model) -> None:
    """Train with `_shifted_depthwise` in the subsampling; the saved model knows nothing of it."""
    for layer in model.encoder.subsampling.layers:
        if getattr(layer, "groups", 1) > 1:
            layer.forward = functools.partial(_shifted_depthwise, layer)


def _batch(items, rng: random.Random, size: int):
    """A batch of similar lengths, padded: (B, T, M), frame counts, texts."""
    import torch

    start = rng.randrange(len(items) - size)
    chosen = items[start : start + size]
    lengths = torch.tensor([len(m) for m, _ in chosen])
    mels = torch.zeros(size, int(lengths.max()), FRONT_END.n_mels)
    for row, (mel, _) in zip(mels, chosen):
        row[: len(mel)] = torch.from_numpy(mel.astype(np.float32))
    return mels, lengths, [t for _, t in chosen]


def ctc_step(model, log_mel, lengths, texts, inter_layer: int = 3, inter_weight: float = 0.3):
    """CTC loss at the top and, to train deep layers sooner, half-way up (arXiv 2102.03216)."""
    import torch
    import torch.nn.functional as F

    mask = torch.arange(log_mel.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
    out = model.encoder(log_mel, attention_mask=mask, output_hidden_states=True)
    n_frames = out.attention_mask.sum(-1)
    targets = [torch.tensor(encode_letters(t)) for t in texts]
    sizes = torch.tensor([len(t) for t in targets])
    loss = 0.0
    for hidden, weight in ((out.last_hidden_state, 1 - inter_weight), (out.hidden_states[inter_layer], inter_weight)):
        log_probs = F.log_softmax(model.ctc_head(hidden).float(), dim=-1).transpose(0, 1)
        ctc = F.ctc_loss(log_probs, torch.cat(targets), n_frames, sizes, blank=BLANK, zero_infinity=True)
        loss = loss + weight * ctc
    return loss


def letter_error(model, audios: list[np.ndarray], texts: list[str]) -> float:
    """Character error rate of greedy CTC, one recording at a time as deployed."""
    import jiwer
    import torch

    model.eval()
    with torch.no_grad():
        heard = [
            decode_letters(model(torch.from_numpy(FRONT_END(a))[None]).logits[0].argmax(-1).numpy()) for a in audios
        ]
    model.train()
    return jiwer.cer(texts, [h or " " for h in heard])


def check_sets(n: int = 40) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Held-out sentences by voices the encoder knows (espeak-ng's, flite's) and by those it never hears."""
    from tiny_align.reference.speech import LEARNT_VOICES, NEW_VOICES, Espeak, flite

    texts, rng, espeak = [s.text for s in corpus.sentences(n, 7, held_out=True)], random.Random(7), Espeak(seed=0)
    sets = {"known": ([espeak.say_as_someone(t, rng) for t in texts], texts)}
    return sets | {v: ([flite(t, v) for t in texts], texts) for v in (*LEARNT_VOICES, *NEW_VOICES)}


def rate_at(step: int, steps: int, warmup: int = 300, decay: float = 0.4) -> float:
    """Share of the peak rate: rises, stays, and falls to nothing over the last `decay` of the steps.

    A checkpoint from before the fall (encoder-stable.pt) can go on to any larger number of steps.
    """
    return min(1.0, step / warmup, max(0.0, (steps - step) / (decay * steps)))


def train(args) -> dict:
    """Trains as `args` (main) says, from the beginning, from `args.start`'s weights or from the checkpoint in work."""
    import torch
    from transformers import ParakeetForCTC

    from tiny_align.reference.augment import augment, normalise, spec_augment

    work, out, steps, seed = args.work, args.out, args.steps, args.seed
    items = sorted(speak(work, args.speech), key=lambda item: len(item[0]))
    checks = check_sets()
    torch.manual_seed(seed)
    model = ParakeetForCTC.from_pretrained(args.start) if args.start else build_model()
    _speed_up(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, functools.partial(rate_at, steps=steps))
    checkpoint, done, log = work / "encoder.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        done, log = state["step"], json.loads(state["log"])
    rng, began = random.Random(seed + done), time.monotonic()
    torch.manual_seed(seed + done)
    model.train()
    bar = tqdm(range(done, steps), initial=done, total=steps, file=sys.stderr, mininterval=10)
    for step in bar:
        mels, lengths, texts = _batch(items, rng, args.batch)
        mels, lengths = augment(mels, lengths)
        mels = spec_augment(normalise(mels, lengths, FRONT_END), lengths)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = ctc_step(model, mels, lengths, texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": round(float(loss.detach()), 3), "seconds": round(time.monotonic() - began)}
            row |= {name: round(letter_error(model, *check), 3) for name, check in checks.items()}
            log.append(row)
            print(json.dumps(row), flush=True)
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "log": json.dumps(log)}
            state |= {"schedule": schedule.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            if rate_at(step + 1, steps) == 1.0:
                shutil.copyfile(checkpoint, work / "encoder-stable.pt")
            model.save_pretrained(out)
            save_front_end(out)
    return {"steps": steps, "parameters": sum(p.numel() for p in model.parameters()), "log": log}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path("reference/weights/encoder"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--speech", type=int, default=N_SPEECH, help="recordings to synthesise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--start", type=Path, help="trained weights to begin with (default: random)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 products: faster where the CPU has them")
    args = parser.parse_args(argv)
    report = train(args)
    if args.start:
        report["started_from"] = json.loads((args.start / "training.json").read_text())
    (args.out / "training.json").write_text(json.dumps(vars(args) | report, indent=1, default=str) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
