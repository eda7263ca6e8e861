"""Prefill and decoding of one INT4 LLM: ours, llama.cpp, transformers and onnxruntime-genai.

    python -m benchmarks.studies.full_size
    python -m benchmarks.studies.llm [--threads 1 2] [--rounds 7] [--json]

The models are those of benchmarks.studies.full_size: Llama-3.2-1B's shape, random weights. Every
engine is a process of its own; they take turns, and a ratio is the median over the rounds. An
engine that is not installed (pip install 'tiny-align[peers]') or that fails is reported with its
reason. `ratios` holds the worst over the numbers of threads; above 1, ours is faster. Writes
benchmarks/results/llm.json; the last line of stdout is the same document.

llama-cpp-python 0.3.36 crashes on processors with AMX unless it is compiled without: see CMAKE_ARGS
in the Makefile.
"""

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.limits import measure_bandwidth
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.peers import PEERS
from tiny_align.benchmarks.standard.processes import PeerProcess
from tiny_align.benchmarks.standard.training_cost import SHAPES
from tiny_align.benchmarks.studies.full_size import WORK
from tiny_align.runtime.errors import DataError

RESULTS = Path(__file__).parents[1] / "results" / "llm.json"
COMMAND = "python -m benchmarks.studies.llm"
OURS = "tiny-align"
SLOW = "transformers"  # it decodes a quarter of the tokens
PACKAGES = ("onnxruntime", "llama-cpp-python", "transformers", "torch", "onnxruntime-genai")
PAUSE_S = 0.1  # between turns: an engine's threads spin a little after their work


def compare(args: argparse.Namespace, threads: int, bar: tqdm) -> dict[str, Any]:
    """All engines at one number of threads, taking turns."""
    prompt = np.random.default_rng(0).integers(1000, 8000, args.prompt)
    shape = SHAPES[args.shape]
    peers = {}
    turns: dict[str, list[dict]] = {}
    for name in args.peers:
        peers[name] = PeerProcess(PEERS[name], args.work, shape, threads, threads=threads)
        turns[name] = []
    bandwidth_before = measure_bandwidth(threads)
    for i in range(args.rounds + 1):
        for name, peer in peers.items():
            time.sleep(PAUSE_S)
            n_tokens = max(2, args.tokens // 4) if name == SLOW else args.tokens
            turn = peer.measure(prompt, n_tokens)
            if turn and i > 0:  # the first round warms up
                turns[name].append(turn)
            bar.update()
    bandwidth = max(bandwidth_before, measure_bandwidth(threads))
    for peer in peers.values():
        peer.close()

    engines: dict[str, dict] = {}
    working = {}
    for name, peer in peers.items():
        if peer.failure is None:
            engines[name] = summary(turns[name], len(prompt))
            working[name] = turns[name]
        else:
            engines[name] = {"missing": peer.failure}
    weight_files = (args.work / "bundle").glob("llm*.data")
    weights_gb = sum(path.stat().st_size for path in weight_files) / 1e9
    read_gb_s = weights_gb * engines[OURS]["decode_tokens_per_s"] if OURS in working else 0.0
    return {
        "engines": engines,
        "ratios": ratios(working),
        "weights_gb": weights_gb,
        "bandwidth_gb_per_s": bandwidth,
        "bandwidth_share": read_gb_s / bandwidth,
    }


def summary(turns: list[dict], n_prompt: int) -> dict[str, Any]:
    """The medians of an engine's turns."""
    prefill_s = float(np.median([turn["prefill_s"] for turn in turns]))
    steps_s = np.concatenate([turn["steps_s"] for turn in turns])
    p10, p90 = np.percentile(steps_s, [10, 90])
    return {
        "prefill_tokens_per_s": n_prompt / prefill_s,
        "decode_tokens_per_s": 1 / float(np.median(steps_s)),
        "decode_ms_p10_p90": [float(p10) * 1e3, float(p90) * 1e3],
        "load_s": turns[-1]["load_s"],
        "peak_gb": turns[-1]["peak_bytes"] / 2**30,
    }


def ratios(turns: dict[str, list[dict]]) -> dict[str, float]:
    """Each peer's seconds over ours, round by round; the median."""
    found: dict[str, float] = {}
    if OURS not in turns:
        return found
    for name, theirs in turns.items():
        if name == OURS:
            continue
        decode = []
        prefill = []
        for their_turn, our_turn in zip(theirs, turns[OURS]):
            decode.append(np.median(their_turn["steps_s"]) / np.median(our_turn["steps_s"]))
            prefill.append(their_turn["prefill_s"] / our_turn["prefill_s"])
        key = name.replace("onnxruntime-", "").replace(".", "_")
        found[f"decode_vs_{key}"] = float(np.median(decode))
        found[f"prefill_vs_{key}"] = float(np.median(prefill))
    return found


def worst_ratios(by_threads: dict[str, dict]) -> dict[str, float]:
    """Each ratio's minimum over the numbers of threads."""
    worst: dict[str, float] = {}
    for row in by_threads.values():
        for name, ratio in row["ratios"].items():
            worst[name] = min(ratio, worst.get(name, ratio))
    return dict(sorted(worst.items()))


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    rows = []
    for threads, row in report["by_threads"].items():
        for name, engine in row["engines"].items():
            rows.append([threads, name, *_engine_cells(engine)])
        share = f"{row['bandwidth_share']:.0%} of {row['bandwidth_gb_per_s']:.1f} GB/s"
        rows.append([threads, "ours, memory bandwidth reached", "", share, ""])
    head = ["threads", "engine", "prompt, tokens/s", "answer, tokens/s", "peak memory"]
    shown = [f"`{name}` {value:.2f}" for name, value in report["ratios"].items()]
    return (
        f"{grid(head, rows)}\n\nRatios, the worse of both numbers of threads: {', '.join(shown)}."
    )


def _engine_cells(engine: dict[str, Any]) -> list[str]:
    if "missing" in engine:
        return [engine["missing"], "", ""]
    return [
        f"{engine['prefill_tokens_per_s']:.0f}",
        f"{engine['decode_tokens_per_s']:.1f}",
        f"{engine['peak_gb']:.2f} GiB",
    ]


def versions() -> dict[str, str]:
    """The version of every package, or that it is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="positions of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="to decode after it")
    args = parser.parse_args(argv)
    if not (args.work / "bundle" / "manifest.json").exists():
        raise DataError(
            f"{args.work} holds no bundle: run python -m benchmarks.studies.full_size first"
        )
    report = stamp(f"{COMMAND} --rounds {args.rounds}") | {
        "versions": versions(),
        "shape": args.shape,
        "prompt": args.prompt,
        "rounds": args.rounds,
        "by_threads": {},
    }
    total = len(args.threads) * len(args.peers) * (args.rounds + 1)
    with tqdm(total=total, desc="turns", file=sys.stderr) as bar:
        for threads in args.threads:
            report["by_threads"][str(threads)] = compare(args, threads, bar)
    report["ratios"] = worst_ratios(report["by_threads"])
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
