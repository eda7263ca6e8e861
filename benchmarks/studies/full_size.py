"""A bundle of real sizes, exported, loaded and run: wav2vec2-base, BridgeFormer, Llama-3.2-1B.

    python -m benchmarks.studies.full_size [--seconds 10] [--threads 2] [--json]

Weights are random, so nothing is downloaded and the answers mean nothing. The LLM is INT4
throughout, its output layer too, as llama.cpp's Q4_0 files are (the default of `tiny-align export`
for that layer is INT8). Export and run are processes of their own, so that their peak memory is
their own. Writes benchmarks/results/full_size.json; the last line of stdout is the same document.
Models and bundle stay in work/full_size (8 GB) for benchmarks.studies.llm.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.processes import peak_memory_bytes
from tiny_align.benchmarks.standard.training_cost import SHAPES, Shape, llama_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).parents[1] / "results" / "full_size.json"
WORK = Path("work/full_size")
COMMAND = "python -m benchmarks.studies.full_size"
CONTEXT = 512  # positions
SOFT_TOKENS_PER_S = 2.5  # of speech
MAX_TOKENS = 32  # of an answer
GIB = 2**30


def make_models(work: Path, shape: Shape) -> None:
    """Encoder, LLM and sentences in `work`, in transformers' form; what is there stays."""
    if (work / "done").exists():
        return
    import torch
    from transformers import (
        LlamaForCausalLM,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )

    from tiny_align.reference import corpus

    torch.manual_seed(0)
    encoder = Wav2Vec2Model(Wav2Vec2Config())  # the default sizes are wav2vec2-base's
    encoder.save_pretrained(work / "encoder")
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(work / "encoder")
    tokenizer = make_tokenizer(shape.vocabulary)
    tokenizer.save_pretrained(work / "llm")
    config = llama_config(
        shape,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(work / "llm")
    lines = [f"{sentence.text}\n" for sentence in corpus.sentences(200, 5)]
    (work / "sentences.txt").write_text("".join(lines), encoding="utf-8")
    (work / "done").touch()


def make_tokenizer(size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE filled up to `size` tokens, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tiny_align.reference import corpus
    from tiny_align.reference.llm import CHAT_TEMPLATE, SPECIAL

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([s.text for s in corpus.sentences(500, 0)], trainer)
    fillers = []
    for i in range(tokenizer.get_vocab_size(), size):
        fillers.append(AddedToken(f"<filler {i}>", normalized=False))
    tokenizer.add_tokens(fillers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
    )


def run_export(work: Path, out: Path, *options: str) -> dict[str, Any]:
    """`tiny-align export` of the models that `make_models` left in `work`; its document."""
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", "export", "--json"]
    command += ["--encoder", str(work / "encoder"), "--llm", str(work / "llm")]
    command += ["--sentences", str(work / "sentences.txt"), "--max-context", str(CONTEXT)]
    command += ["--out", str(out), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def export(work: Path, head_precision: str) -> dict[str, Any]:
    """Export the bundle: what it took."""
    began = time.perf_counter()
    document = run_export(work, work / "bundle", "--head-precision", head_precision)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB,
        "bundle_gb": document["bytes"] / 1e9,
        "parity": {name: graph["parity"] for name, graph in document["graphs"].items()},
    }


def run(bundle: Path, audio_s: float, threads: int, rounds: int = 3) -> dict[str, Any]:
    """Load the bundle and answer speech-like noise: seconds and memory of this process."""
    from tiny_align.runtime.assistant import Assistant
    from tiny_align.runtime.llm import Decoding

    peak_before_load = peak_memory_bytes()
    rng = np.random.default_rng(0)
    decoding = Decoding(max_tokens=MAX_TOKENS, loop_tokens=0)
    seconds: dict[str, list[float]] = {"encoder": [], "projector": [], "prefill": [], "token": []}
    began = time.perf_counter()
    with Assistant.load(bundle, threads=threads) as assistant:
        load_s = time.perf_counter() - began
        noise = rng.standard_normal(round(audio_s * assistant.sample_rate)) * 0.1
        audio = noise.astype(np.float32)
        n_soft_tokens = round(SOFT_TOKENS_PER_S * audio_s)
        ids = rng.integers(0, assistant.llm.spec.vocabulary, n_soft_tokens)
        soft_tokens = assistant.llm.embed(ids)
        for _ in range(rounds):
            began = time.perf_counter()
            features = assistant.encode_window(audio)
            encoded = time.perf_counter()
            assistant.soft_tokens(features)  # of an untrained projector: any number of them
            projected = time.perf_counter()
            prompt = assistant.llm.assemble(soft_tokens)
            ticks = []
            for _ in assistant.llm.generate(prompt, decoding):
                ticks.append(time.perf_counter())
            seconds["encoder"].append(encoded - began)
            seconds["projector"].append(projected - encoded)
            seconds["prefill"].append(ticks[0] - projected)
            seconds["token"].append((ticks[-1] - ticks[0]) / (len(ticks) - 1))
    return {
        "load_s": load_s,
        "encoder_s": float(np.median(seconds["encoder"])),
        "projector_s": float(np.median(seconds["projector"])),
        "prefill_s": float(np.median(seconds["prefill"])),
        "prompt_positions": len(prompt),
        "tokens_per_s": 1 / float(np.median(seconds["token"])),
        "peak_gb": peak_memory_bytes() / GIB,
        "peak_before_load_gb": peak_before_load / GIB,
    }


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    export_row = report["export"]
    run_row = report["run"]
    head_precision = report["head_precision"].upper()
    rows = [
        [
            "export",
            f"{export_row['seconds']:.0f} s, peak memory {export_row['peak_gb']:.1f} GiB",
        ],
        [
            "bundle",
            f"{export_row['bundle_gb']:.2f} GB, the LLM's output layer {head_precision}",
        ],
        ["load", f"{run_row['load_s']:.1f} s"],
        [f"encoder, {report['audio_s']:g} s of audio", f"{run_row['encoder_s']:.2f} s"],
        ["projector and readout", f"{run_row['projector_s']:.2f} s"],
        [f"prompt of {run_row['prompt_positions']} positions", f"{run_row['prefill_s']:.2f} s"],
        ["answer", f"{run_row['tokens_per_s']:.1f} tokens/s"],
        ["peak memory of the running pipeline", f"{run_row['peak_gb']:.2f} GiB"],
    ]
    return grid([f"{report['threads']} threads", ""], rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head-precision", default="int4", help="of the LLM's output layer")
    args = parser.parse_args(argv)
    report = stamp(COMMAND) | {
        "threads": args.threads,
        "shape": args.shape,
        "audio_s": args.seconds,
        "head_precision": args.head_precision,
    }
    args.work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with tqdm(total=3, desc="full size", file=sys.stderr) as bar:
        # the pool ends after the export, whose peak memory would count that of ended processes
        with context.Pool(1) as pool:
            pool.apply(make_models, (args.work, SHAPES[args.shape]))
            bar.update()
            report["export"] = export(args.work, args.head_precision)
            bar.update()
        with context.Pool(1) as pool:
            report["run"] = pool.apply(run, (args.work / "bundle", args.seconds, args.threads))
            bar.update()
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
