"""A bundle of real sizes on this machine: wav2vec2-base, BridgeFormer and Llama-3.2-1B, exported, loaded and run.

    python -m benchmarks.studies.full_size [--seconds 10] [--threads 2] [--head-precision int4] [--json]

Weights are random, so nothing is downloaded and the answers mean nothing. The LLM is INT4 throughout, its output layer
too, as llama.cpp's Q4_0 files are (`tiny-align export` makes that layer INT8 unless told otherwise). Export and run are
processes of their own, so that their peak memory is their own. Writes benchmarks/results/full_size.json; the last line
of stdout is the same document. The models and the bundle stay in work/full_size (8 GB) for benchmarks.llm.
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish
from tiny_align.benchmarks.standard.training_cost import SHAPES, Shape, llama_config
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "full_size.json"
WORK = Path("work/full_size")
COMMAND = "python -m benchmarks.studies.full_size"
CONTEXT = 512  # positions


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
    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(
        work / "encoder"
    )  # the default sizes are wav2vec2-base's
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
    (work / "sentences.txt").write_text(
        "".join(f"{s.text}\n" for s in corpus.sentences(200, 5)), encoding="utf-8"
    )
    (work / "done").touch()


def make_tokenizer(size: int):
    """A byte-level BPE filled up to `size` tokens, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tiny_align.reference import corpus
    from tiny_align.reference.llm import CHAT_TEMPLATE, SPECIAL

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    options = {
        "special_tokens": list(SPECIAL),
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
    }
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, **options)
    tokenizer.train_from_iterator([s.text for s in corpus.sentences(500, 0)], trainer)
    rest = range(tokenizer.get_vocab_size(), size)
    tokenizer.add_tokens([AddedToken(f"<filler {i}>", normalized=False) for i in rest])
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


def export(work: Path, head: str) -> dict:
    """The command `tiny-align export` on the models, and what it took."""
    line = [
        "export",
        "--encoder",
        work / "encoder",
        "--llm",
        work / "llm",
        "--sentences",
        work / "sentences.txt",
    ]
    line += ["--head-precision", head, "--max-context", CONTEXT, "--out", work / "bundle", "--json"]
    began = time.perf_counter()
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *map(str, line)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    return {
        "seconds": time.perf_counter() - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "bundle_gb": report["bytes"] / 1e9,
        "parity": {name: graph["parity"] for name, graph in report["graphs"].items()},
    }


def run(bundle: Path, audio_s: float, threads: int, rounds: int = 3) -> dict:
    """Load the bundle and answer speech-like noise: seconds and memory of this process."""
    from tiny_align.runtime.assistant import Assistant
    from tiny_align.runtime.llm import Decoding

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter()
    with Assistant.load(bundle, threads=threads) as assistant:
        load_s, rng, rows = time.perf_counter() - began, np.random.default_rng(0), []
        audio = (rng.standard_normal(round(audio_s * assistant.sample_rate)) * 0.1).astype(
            np.float32
        )
        speech = assistant.llm.embed(
            rng.integers(0, assistant.llm.spec.vocabulary, round(2.5 * audio_s))
        )
        for _ in range(rounds):
            marks = [time.perf_counter()]
            features = assistant.encode_window(audio)
            marks.append(time.perf_counter())
            assistant.soft_tokens(features)  # of an untrained projector: any number of them
            marks.append(time.perf_counter())
            prompt, ticks = assistant.llm.assemble(speech), []
            for _ in assistant.llm.generate(prompt, Decoding(max_tokens=32, loop_tokens=0)):
                ticks.append(time.perf_counter())
            first, rest = ticks[0] - marks[2], (ticks[-1] - ticks[0]) / (len(ticks) - 1)
            rows.append((marks[1] - marks[0], marks[2] - marks[1], first, rest))
    encoder, projector, first, rest = np.median(rows, axis=0)
    return {
        "load_s": load_s,
        "encoder_s": encoder,
        "projector_s": projector,
        "prefill_s": first,
        "prompt_positions": len(prompt),
        "tokens_per_s": 1 / rest,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_before_load_gb": before,
    }


def table(report: dict) -> str:
    """The report as the README's table."""
    made, ran = report["export"], report["run"]
    rows = {
        "export": f"{made['seconds']:.0f} s, peak memory {made['peak_gb']:.1f} GiB",
        "bundle": f"{made['bundle_gb']:.2f} GB, the LLM's output layer {report['head_precision'].upper()}",
        "load": f"{ran['load_s']:.1f} s",
        f"encoder, {report['audio_s']:g} s of audio": f"{ran['encoder_s']:.2f} s",
        "projector and readout": f"{ran['projector_s']:.2f} s",
        f"prompt of {ran['prompt_positions']} positions": f"{ran['prefill_s']:.2f} s",
        "answer": f"{ran['tokens_per_s']:.1f} tokens/s",
        "peak memory of the running pipeline": f"{ran['peak_gb']:.2f} GiB",
    }
    head = f"| {report['threads']} threads | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head-precision", default="int4", help="of the LLM's output layer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    report = {
        "machine": describe(),
        "date": str(date.today()),
        "command": COMMAND,
        "threads": args.threads,
    }
    report |= {"shape": args.shape, "audio_s": args.seconds, "head_precision": args.head_precision}
    with (
        tqdm(total=3, desc="full size", file=sys.stderr) as bar,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        args.work.mkdir(parents=True, exist_ok=True)
        pool.apply(make_models, (args.work, SHAPES[args.shape]))
        bar.update()
        report["export"] = export(args.work, args.head_precision)
        bar.update()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report["run"] = pool.apply(run, (args.work / "bundle", args.seconds, args.threads))
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
