"""What one training step costs without the LLM and through it, at real LLM sizes.

    python -m benchmarks.standard.training_cost [--shapes llama-3.2-1b] [--device cuda] [--json]

Measures seconds and peak memory. Weights are random, of the named shapes. Both sides train on the
same batch and utterance lengths, and change the parameters that a user's training changes: the
projector's entrance and, where nothing is pooled, its shortcut. Without the LLM, the table is that
of the speech vocabulary: of a few thousand tokens, and of as many as a large data set has. Every
measurement is a process of its own, so its peak memory is its own; on a GPU it is that of PyTorch's
allocator. Writes benchmarks/results/training_cost.json, or training_cost-gpu.json; the last line of
stdout is the same document.
"""

import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.processes import peak_memory_bytes

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny_align.align.data.examples import Example
    from tiny_align.align.training.trainer import TrainOptions

RESULTS = Path(__file__).parents[1] / "results" / "training_cost.json"
GPU_RESULTS = RESULTS.with_name("training_cost-gpu.json")
COMMAND = "python -m benchmarks.standard.training_cost"
GPU_STEPS = 20
LARGE_VOCABULARY = 20_000  # tokens of the speech vocabulary of a large data set

BATCH = 16  # a short sentence and its answer, so many times
FEATURES = 80  # rows
FEATURE_SIZE = 768  # wav2vec2-base's
WORDS = 8
SOFT_TOKENS = 24
PROMPT = 12  # positions
ANSWER = 12  # tokens


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


class Form(NamedTuple):
    """One way to train."""

    objective: str
    precision: str  # of the LLM
    steps: int  # on a CPU
    speech_tokens: int | None  # None: all of the LLM's tokens


FORMS = {
    "ctc": Form("ctc", "float32", 30, 4000),
    f"ctc, {LARGE_VOCABULARY:,} tokens": Form("ctc", "float32", 30, LARGE_VOCABULARY),
    "end-to-end": Form("end-to-end", "float32", 2, None),
    "end-to-end bf16": Form("end-to-end", "bfloat16", 2, None),
}


def llama_config(shape: Shape, **options: Any) -> "LlamaConfig":
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
        **options,
    )


def build_llm(shape: Shape, dtype: "torch.dtype") -> "LlamaForCausalLM":
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


def make_objective(
    options: "TrainOptions", shape: Shape, dtype: "torch.dtype", n_tokens: int
) -> Any:
    """The options' objective, over a random table or through a random LLM."""
    import torch

    from tiny_align.align.model.objectives import make
    from tiny_align.align.model.objectives.end_to_end import FrozenLlm
    from tiny_align.runtime.readout import ctc_scale

    if options.objective == "end-to-end":
        prompt = 0.02 * torch.randn(PROMPT, shape.hidden)
        return make(options, None, llm=FrozenLlm(build_llm(shape, dtype), [prompt], prompt[:1]))
    table = 0.02 * torch.randn(n_tokens, shape.hidden)
    return make(options, table, ctc_scale(table.cpu().numpy()))


def make_batch(shape: Shape, n_tokens: int) -> "list[Example]":
    """A batch and a validation set: noise for features, random words of the speech vocabulary."""
    from tiny_align.align.data.examples import Example
    from tiny_align.align.training.validation import MIN_VALIDATION

    rng = np.random.default_rng(0)
    examples = []
    for _ in range(BATCH + MIN_VALIDATION):
        features = rng.standard_normal((FEATURES, FEATURE_SIZE)).astype(np.float32)
        answer = tuple(rng.integers(shape.vocabulary, size=ANSWER).tolist())
        words = rng.integers(n_tokens, size=WORDS).tolist()
        examples.append(Example(features, words, [5] * WORDS, answers=(answer,)))
    return examples


def measure(shape_name: str, form: str, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds per step and peak memory of one form on `device`."""
    import torch

    torch.set_num_threads(threads)
    steps = GPU_STEPS if device == "cuda" else FORMS[form].steps
    with torch.device(device):
        record = train(SHAPES[shape_name], FORMS[form], steps)
    peak_bytes = peak_memory_bytes()
    if device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return {"step_s": record["train_seconds"] / steps, "steps": steps, "peak_gb": peak_bytes / 1e9}


def train(shape: Shape, form: Form, steps: int) -> dict[str, Any]:
    """Train a user's projector for one step, to warm up, then for `steps`; the latter's record."""
    import torch

    from tiny_align.align.model.projector import build_projector
    from tiny_align.align.training.trainer import Trainer, TrainOptions

    torch.manual_seed(0)
    n_tokens = min(form.speech_tokens or shape.vocabulary, shape.vocabulary)
    options = TrainOptions(
        objective=form.objective,
        shortcut_threshold=0.0,  # the shortcut is trained too
        batch=BATCH,
        held_out=0.0,
        check_every=10**6,
    )
    sizes = {
        "feature_size": FEATURE_SIZE,
        "shortcut_size": FEATURE_SIZE,
        "embedding_size": shape.hidden,
        "soft_tokens": None if form.objective == "ctc" else SOFT_TOKENS,
        "kind": "bridgeformer",
    }
    projector = build_projector(sizes)
    examples = make_batch(shape, n_tokens)
    objective = make_objective(options, shape, getattr(torch, form.precision), n_tokens)
    for n in (1, steps):
        trainer = Trainer(projector, examples, objective, replace(options, steps=n), None)
        record = trainer.run(quiet=True).record
    return record


def forms_of(shape: Shape) -> list[str]:
    """All but those with more tokens than there are."""
    if shape.vocabulary >= LARGE_VOCABULARY:
        return list(FORMS)
    return [name for name, form in FORMS.items() if form.speech_tokens != LARGE_VOCABULARY]


def compare(shape_name: str, threads: int, device: str = "cpu") -> dict[str, dict]:
    """Every form, on a CPU in a process of its own, and end-to-end's step over ours."""
    names = forms_of(SHAPES[shape_name])
    forms = {}
    if device == "cuda":
        for name in names:
            forms[name] = measure(shape_name, name, threads, device)
    else:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for name in names:
                forms[name] = pool.apply(measure, (shape_name, name, threads))
    ratios = {}
    for name in names:
        if not name.startswith("ctc"):
            ratios[name] = forms[name]["step_s"] / forms["ctc"]["step_s"]
    return {"forms": forms, "step_ratio": ratios}


def gpu_name(device: str) -> dict[str, str]:
    """A GPU's name, for the stamp of a measurement."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    head = ["LLM's shape", "training", "seconds per step", "end-to-end / ours", "peak memory"]
    rows = []
    for shape_name, shape in report["shapes"].items():
        for form, row in shape["forms"].items():
            ratio = shape["step_ratio"].get(form)
            rows.append(
                [
                    shape_name,
                    form,
                    f"{row['step_s']:.3f}",
                    f"{ratio:.0f}x" if ratio else "",
                    f"{row['peak_gb']:.1f} GB",
                ]
            )
    return grid(head, rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.out = args.out or (GPU_RESULTS if on_gpu else RESULTS)
    report = stamp(f"{COMMAND} --device cuda" if on_gpu else COMMAND)
    report["machine"] |= gpu_name(args.device)
    report |= {
        "threads": args.threads,
        "batch": BATCH,
        "frames": FEATURES,
        "words": WORDS,
        "soft_tokens": SOFT_TOKENS,
        "answer": ANSWER,
        "shapes": {},
    }
    for name in tqdm(args.shapes, desc="shapes"):
        report["shapes"][name] = compare(name, args.threads, args.device)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
