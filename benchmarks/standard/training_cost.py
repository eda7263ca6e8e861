"""What one training step costs without the LLM and through it: seconds and peak memory at real LLM sizes.

    python -m benchmarks.standard.training_cost [--shapes llama-3.2-1b llama-3.2-3b] [--device cuda] [--json]

Random weights of the named shapes; the same batch and utterance lengths on both sides, and those parts of a projector
that a person's training changes: its entrance and, where nothing is pooled, its shortcut. Without the LLM the table is
that of the speech vocabulary, of a few thousand tokens and of as many as a large data set has. Every measurement is a
process of its own, so that its peak memory is its own; on a GPU it is what PyTorch's allocator says of the
GPU's. Writes benchmarks/results/training_cost.json, or training_cost-gpu.json; the last line of stdout is the same
document.
"""

import argparse
import multiprocessing
import resource
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "training_cost.json"
GPU_RESULTS = RESULTS.with_name("training_cost-gpu.json")
COMMAND = "python -m benchmarks.standard.training_cost"
BATCH, FRAMES, WORDS, SOFT_TOKENS, PROMPT, ANSWER = (
    16,
    80,
    8,
    24,
    12,
    12,
)  # a short sentence and its answer
FEATURES = 768  # wav2vec2-base's


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    head_size: int


SHAPES = {  # the reference bundle's LLM, and two of https://huggingface.co/meta-llama
    "reference": Shape(192, 4, 6, 3, 512, 800, 32),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 8192, 128_256, 64),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 8192, 128_256, 128),
}
GPU_STEPS = 20
LARGEST = 20_000  # tokens of the speech vocabulary of a large data set
FORMS = {  # what is trained: (objective, the LLM's precision, steps, tokens of the speech vocabulary)
    "ctc": ("ctc", "float32", 30, 4000),
    f"ctc, {LARGEST:,} tokens": ("ctc", "float32", 30, LARGEST),
    "end-to-end": ("end-to-end", "float32", 2, None),
    "end-to-end bf16": ("end-to-end", "bfloat16", 2, None),
}


def llama_config(shape: Shape, **more):
    """transformers' configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=True,
        **more,
    )


def build_llm(shape: Shape, dtype):
    """transformers' Llama with random weights, made in place in `dtype`."""
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(shape)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def make_objective(options, shape: Shape, dtype, n_tokens: int):
    import torch

    from tiny_align.align.model.objectives import make
    from tiny_align.align.model.objectives.end_to_end import FrozenLlm
    from tiny_align.runtime.readout import ctc_scale

    if options.objective == "end-to-end":
        prompt = 0.02 * torch.randn(PROMPT, shape.hidden)
        return make(options, None, llm=FrozenLlm(build_llm(shape, dtype), [prompt], prompt[:1]))
    table = 0.02 * torch.randn(n_tokens, shape.hidden)
    return make(options, table, ctc_scale(table.cpu().numpy()))


def utterances(shape: Shape, n_tokens: int) -> list:
    """A batch of them: noise for features, random words of the speech vocabulary."""
    from tiny_align.align.data.examples import Example
    from tiny_align.align.training.validation import MIN_VALIDATION

    rng = np.random.default_rng(0)

    def tokens(n: int, among: int) -> list[int]:
        return rng.integers(among, size=n).tolist()

    def one() -> Example:
        features = rng.standard_normal((FRAMES, FEATURES)).astype(np.float32)
        answer = tuple(tokens(ANSWER, shape.vocabulary))
        return Example(features, tokens(WORDS, n_tokens), [5] * WORDS, answers=(answer,))

    return [one() for _ in range(BATCH + MIN_VALIDATION)]  # which are held out


def measure(shape_name: str, form: str, threads: int, device: str = "cpu") -> dict:
    """Seconds per step and peak memory of one form on `device`; a training of one step before warms up."""
    import torch

    torch.set_num_threads(threads)
    with torch.device(device):
        steps, record = _train(shape_name, form, GPU_STEPS if device == "cuda" else None)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_s": record["train_seconds"] / steps, "steps": steps, "peak_gb": peak / 1e9}


def _train(shape_name: str, form: str, n_steps: int | None) -> tuple[int, dict]:
    """`n_steps` or as many as suit the form -> how many, and the training's record."""
    import torch

    from tiny_align.align.model.projector import build_projector
    from tiny_align.align.training.trainer import Trainer, TrainOptions

    torch.manual_seed(0)
    shape, (objective, precision, steps, spoken) = SHAPES[shape_name], FORMS[form]
    n_tokens = min(spoken or shape.vocabulary, shape.vocabulary)
    options = TrainOptions(
        objective=objective, shortcut_threshold=0.0, batch=BATCH, held_out=0.0, check_every=10**6
    )  # somebody far: their shortcut is trained too
    soft_tokens = None if objective == "ctc" else SOFT_TOKENS
    sizes = {"feature_size": FEATURES, "shortcut_size": FEATURES, "embedding_size": shape.hidden}
    sizes |= {"soft_tokens": soft_tokens, "kind": "bridgeformer"}
    projector, examples = build_projector(sizes), utterances(shape, n_tokens)
    target = make_objective(options, shape, getattr(torch, precision), n_tokens)
    steps = n_steps or steps
    for n in (1, steps):
        record = (
            Trainer(projector, examples, target, replace(options, steps=n), None)
            .run(quiet=True)
            .record
        )
    return steps, record


def forms_of(shape: Shape) -> list[str]:
    """All but those with more tokens than there are."""
    return [
        form
        for form, (*_, spoken) in FORMS.items()
        if spoken != LARGEST or shape.vocabulary >= LARGEST
    ]


def compare(shape_name: str, threads: int, device: str = "cpu") -> dict:
    """Every form, on a CPU in a process of its own, and end-to-end's step over ours."""
    names = forms_of(SHAPES[shape_name])
    if device == "cuda":
        forms = {form: measure(shape_name, form, threads, device) for form in names}
    else:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            forms = {form: pool.apply(measure, (shape_name, form, threads)) for form in names}
    ratios = {
        form: row["step_s"] / forms["ctc"]["step_s"]
        for form, row in forms.items()
        if not form.startswith("ctc")
    }
    return {"forms": forms, "step_ratio": ratios}


def gpu_of(device: str) -> dict[str, str]:
    """A GPU's name, for the stamp of a measurement."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def table(report: dict) -> str:
    """The report as the README's table."""
    lines = [
        "| LLM's shape | training | seconds per step | end-to-end / ours | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, shape in report["shapes"].items():
        for form, row in shape["forms"].items():
            ratio = shape["step_ratio"].get(form)
            shown = f"{ratio:.0f}x" if ratio else ""
            lines.append(
                f"| {name} | {form} | {row['step_s']:.3f} | {shown} | {row['peak_gb']:.1f} GB |"
            )
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="file (default: beside the other results)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    args.out = args.out or (GPU_RESULTS if args.device == "cuda" else RESULTS)
    report = {"machine": describe() | gpu_of(args.device), "date": str(date.today())}
    report["command"] = f"{COMMAND} --device cuda" if args.device == "cuda" else COMMAND
    report |= {"threads": args.threads}
    report |= {
        "batch": BATCH,
        "frames": FRAMES,
        "words": WORDS,
        "soft_tokens": SOFT_TOKENS,
        "answer": ANSWER,
    }
    report["shapes"] = {}
    for name in tqdm(args.shapes, desc="shapes"):
        report["shapes"][name] = compare(name, args.threads, args.device)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
