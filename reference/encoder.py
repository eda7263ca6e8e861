"""Trains the reference encoder: a small FastConformer (transformers' Parakeet) with CTC over
letters.

On synthetic speech (spoken.py), augmented anew in every step (augment.py), on a GPU in minutes.
Resumable: run the same command again.

    python -m tiny_align.reference.encoder --work work --out reference/weights/encoder --device cuda
"""

import argparse
import functools
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference import corpus
from tiny_align.reference.spoken import FRONT_END, Spoken

LETTERS = "abcdefghijklmnopqrstuvwxyz' "
BLANK = len(LETTERS)
N_SPEECH = 90_000  # recordings
TAKE_IN_EVERY = 100  # steps; recordings synthesised meanwhile join the training


def encode_letters(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def decode_letters(ids: np.ndarray) -> str:
    """(N,) most likely letter per frame -> text: repeats merged, blanks dropped (greedy CTC)."""
    text = ""
    previous = BLANK
    for letter in map(int, ids):
        if letter not in (previous, BLANK):
            text += LETTERS[letter]
        previous = letter
    return text.strip()


def save_front_end(out: Path) -> None:
    """preprocessor_config.json, as transformers' ParakeetFeatureExtractor has it, and what our
    front end adds.
    """
    names = {
        "n_mels": "feature_size",
        "sample_rate": "sampling_rate",
        "hop_samples": "hop_length",
        "n_fft": "n_fft",
    }
    names |= {"preemphasis": "preemphasis", "window_samples": "win_length"}
    value = {theirs: getattr(FRONT_END, ours) for ours, theirs in names.items()}
    value |= {name: getattr(FRONT_END, name) for name in ("floor_db", "speech_share")}
    value |= {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "padding_side": "right",
        "padding_value": 0.0,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(value, indent=1) + "\n")


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
    """A depthwise convolution as shifted products of the input's phases: same result, a backward
    pass 5x faster here.

    The input is first split into `step` x `step` phases, so that what a shift leaves out stays
    small.
    """
    import torch.nn.functional as F

    (rows, columns), (step, _), (pad, _) = conv.kernel_size, conv.stride, conv.padding
    height, width = ((n + 2 * pad - k) // step + 1 for n, k in zip(x.shape[2:], conv.kernel_size))
    x = F.pad(
        x, (pad, pad + -(x.shape[3] + 2 * pad) % step, pad, pad + -(x.shape[2] + 2 * pad) % step)
    )
    b, c, h, w = x.shape
    phases = (
        x.view(b, c, h // step, step, w // step, step)
        .permute(3, 5, 0, 1, 2, 4)
        .flatten(0, 1)
        .unbind()
    )
    out = conv.bias[:, None, None]
    for i in range(rows):
        for j in range(columns):
            phase, top, left = phases[i % step * step + j % step], i // step, j // step
            out = (
                out
                + phase[:, :, top : top + height, left : left + width]
                * conv.weight[:, :, i, j, None]
            )
    return out


def _speed_up(model) -> None:
    """Train with `_shifted_depthwise` in the subsampling; the saved model is unchanged."""
    for layer in model.encoder.subsampling.layers:
        if getattr(layer, "groups", 1) > 1:
            layer.forward = functools.partial(_shifted_depthwise, layer)


def ctc_step(
    model, log_mel, lengths, texts: list[list[int]], inter_layer: int = 3, inter_weight: float = 0.3
):
    """CTC loss of the letters' numbers at the top and, to train deep layers sooner, half-way up
    (arXiv 2102.03216).
    """
    import torch
    import torch.nn.functional as F

    mask = torch.arange(log_mel.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
    letters = [letter for text in texts for letter in text]
    targets, sizes = torch.tensor(letters), torch.tensor([len(text) for text in texts])
    out = model.encoder(log_mel, attention_mask=mask, output_hidden_states=True)
    n_frames = out.attention_mask.sum(-1)
    loss = 0.0
    for hidden, weight in (
        (out.last_hidden_state, 1 - inter_weight),
        (out.hidden_states[inter_layer], inter_weight),
    ):
        log_probs = F.log_softmax(model.ctc_head(hidden).float(), dim=-1).transpose(0, 1)
        ctc = F.ctc_loss(log_probs, targets, n_frames, sizes, blank=BLANK, zero_infinity=True)
        loss = loss + weight * ctc
    return loss


def letter_error(model, audios: list[np.ndarray], texts: list[str]) -> float:
    """Character error rate of greedy CTC, one recording at a time as deployed."""
    import jiwer
    import torch

    model.eval()
    with torch.no_grad():
        logits = [
            model(torch.from_numpy(FRONT_END(a)).to(model.device)[None]).logits[0] for a in audios
        ]
        recognised = [decode_letters(each.argmax(-1).cpu().numpy()) for each in logits]
    model.train()
    return jiwer.cer(texts, [text or " " for text in recognised])


def check_sets(n: int = 40) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Held-out sentences by voices the encoder knows (espeak-ng's, flite's) and by new ones."""
    from tiny_align.reference.speech import NEW_VOICES, TRAINING_VOICES, Espeak, flite

    texts, rng, espeak = (
        [s.text for s in corpus.sentences(n, 7, held_out=True)],
        random.Random(7),
        Espeak(seed=0),
    )
    sets = {"known": ([espeak.say_randomly(t, rng) for t in texts], texts)}
    return sets | {
        v: ([flite(t, v) for t in texts], texts) for v in (*TRAINING_VOICES, *NEW_VOICES)
    }


def rate_at(step: int, done: float, warmup: int = 200, decay: float = 0.4) -> float:
    """Share of the peak rate: rises, stays, and falls to nothing over the last `decay` of the
    training.

    Args:
        done: share of the training that is over.
    """
    return min(1.0, (step + 1) / warmup, (1 - done) / decay)


def train(args) -> dict:
    """Trains as `args` (main) says, from the beginning, from `args.start`'s weights or from the
    checkpoint in work.
    """
    import torch
    from transformers import ParakeetForCTC

    from tiny_align.reference.augment import augment, normalise, spec_augment

    work, out, steps, seed = args.work, args.out, args.steps, args.seed
    spoken = Spoken(work, args.speech, encode_letters, args.device)
    checks = check_sets(args.validation) if args.validation else {}
    torch.set_default_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(seed)
    model = (load_pretrained(ParakeetForCTC, args.start) if args.start else build_model()).to(
        args.device
    )
    if args.device == "cpu":
        _speed_up(model)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=args.rate, weight_decay=1e-2, betas=(0.9, 0.98)
    )
    checkpoint, done, log = work / "encoder.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, log = state["step"], json.loads(state["log"])
    rng, began = random.Random(seed + done), time.monotonic()
    torch.manual_seed(seed + done)
    model.train()
    bar = tqdm(range(done, steps), initial=done, total=steps, file=sys.stderr, mininterval=10)
    for step in bar:
        over = max(step / steps, (time.monotonic() - began) / args.max_seconds)
        if over >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = args.rate * rate_at(step, over)
        mels, lengths, texts = spoken.batch(rng, args.batch)
        mels, lengths = augment(mels, lengths)
        mels = spec_augment(normalise(mels, lengths, FRONT_END), lengths)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = ctc_step(model, mels, lengths, texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done = step + 1
        if done % TAKE_IN_EVERY == 0:
            spoken.take_in()
        if done % args.check_every == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
            row = {"step": done, "recordings": len(spoken), "loss": round(float(loss.detach()), 3)}
            row |= {"seconds": round(time.monotonic() - began)}
            row |= {name: round(letter_error(model, *check), 3) for name, check in checks.items()}
            log.append(row)
            print(json.dumps(row), flush=True)
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "log": json.dumps(log),
            }
            torch.save(state | {"step": done}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    model.save_pretrained(out)
    return {
        "steps_done": done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path("reference/weights/encoder"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), help="time limit: fewer steps"
    )
    parser.add_argument("--batch", type=int, default=90_000, help="frames of log-mel, 10 ms each")
    parser.add_argument("--check-every", type=int, default=500, help="steps")
    parser.add_argument(
        "--validation",
        "--judged",
        type=int,
        default=40,
        help="validation recordings of each voice (0: none)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, for days, or cuda")
    parser.add_argument("--speech", type=int, default=N_SPEECH, help="recordings to synthesise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument(
        "--start", type=Path, help="trained weights to start from (default: random)"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 products: faster on CPUs that have them"
    )
    args = parser.parse_args(argv)
    report = train(args)
    if args.start:
        report["started_from"] = json.loads((args.start / "training.json").read_text())
    (args.out / "training.json").write_text(
        json.dumps(vars(args) | report, indent=1, default=str) + "\n"
    )
    save_front_end(args.out)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
