"""Decoding and prefill of one INT4 LLM: ours beside llama.cpp, transformers and onnxruntime-genai, in one run.

    python -m benchmarks.studies.full_size && python -m benchmarks.studies.llm [--threads 1 2] [--rounds 7] [--json]

The models are those of benchmarks.full_size: Llama-3.2-1B's shape, random weights. Every engine is a process of its
own; they take turns, and a ratio is the median over the rounds. An engine that is not installed (pip install
'tiny-align[peers]') or that fails is reported with its reason. Writes benchmarks/results/llm.json; the last line of
stdout is the same document. (llama-cpp-python 0.3.36 crashes on processors with AMX unless it is compiled without: see
CMAKE_ARGS in the Makefile.) `ratios` holds the worst over the numbers of threads; above 1, ours is faster.
"""

import argparse
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish
from tiny_align.benchmarks.standard.limits import measure_bandwidth
from tiny_align.benchmarks.standard.peers import PEERS
from tiny_align.benchmarks.standard.processes import Served
from tiny_align.benchmarks.standard.training_cost import SHAPES
from tiny_align.benchmarks.studies.full_size import WORK
from tiny_align.runtime.errors import DataError
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "llm.json"
COMMAND = "python -m benchmarks.studies.llm"
OURS = "tiny-align"
PACKAGES = ("onnxruntime", "llama-cpp-python", "transformers", "torch", "onnxruntime-genai")
PAUSE_S = 0.1  # between turns: an engine's threads spin a little after their work


def compare(args, threads: int, bar) -> dict:
    """All engines at one number of threads, taking turns."""
    prompt = np.random.default_rng(0).integers(1000, 8000, args.prompt)
    peers = {
        name: Served(PEERS[name], args.work, SHAPES[args.shape], threads, threads=threads)
        for name in args.peers
    }
    rows = {name: [] for name in peers}
    gb_s = [measure_bandwidth(threads)]
    for round_ in range(args.rounds + 1):  # the first is to warm up
        for name, peer in peers.items():
            time.sleep(PAUSE_S)
            n_tokens = args.tokens if name != "transformers" else max(2, args.tokens // 4)
            row = peer.measure(prompt, n_tokens)
            rows[name] += [row] if round_ and row else []
            bar.update()
    gb_s.append(measure_bandwidth(threads))
    for peer in peers.values():
        peer.close()
    engines = {
        name: {"missing": peer.why} if peer.why else summary(rows[name], prompt)
        for name, peer in peers.items()
    }
    read = sum(p.stat().st_size for p in (args.work / "bundle").glob("llm*.data")) / 1e9
    gb_s, share = max(gb_s), read * engines[OURS]["decode_tokens_per_s"] if OURS in engines else 0.0
    return {
        "engines": engines,
        "ratios": ratios({name: r for name, r in rows.items() if peers[name].why is None}),
        "weights_gb": read,
        "bandwidth_gb_per_s": gb_s,
        "bandwidth_share": share / gb_s,
    }


def summary(rows: list[dict], prompt: np.ndarray) -> dict:
    """The medians of an engine's turns."""
    steps = np.concatenate([row["steps_s"] for row in rows])
    return {
        "prefill_tokens_per_s": len(prompt) / float(np.median([row["prefill_s"] for row in rows])),
        "decode_tokens_per_s": 1 / float(np.median(steps)),
        "decode_ms_p10_p90": [float(v) * 1e3 for v in np.percentile(steps, [10, 90])],
        "load_s": rows[-1]["load_s"],
        "peak_gb": rows[-1]["peak_bytes"] / 2**30,
    }


def ratios(rows: dict[str, list[dict]]) -> dict[str, float]:
    """Peer's seconds over ours, round by round; the median."""
    found = {}
    for name, theirs in rows.items():
        if name == OURS or OURS not in rows:
            continue
        key = name.replace("onnxruntime-", "").replace(".", "_")
        pairs = list(zip(theirs, rows[OURS]))
        decode = [np.median(a["steps_s"]) / np.median(b["steps_s"]) for a, b in pairs]
        found[f"decode_vs_{key}"] = float(np.median(decode))
        found[f"prefill_vs_{key}"] = float(
            np.median([a["prefill_s"] / b["prefill_s"] for a, b in pairs])
        )
    return found


def worst(by_threads: dict[str, dict]) -> dict[str, float]:
    """Each ratio's least over the numbers of threads."""
    names = {name for row in by_threads.values() for name in row["ratios"]}
    return {
        n: min(row["ratios"][n] for row in by_threads.values() if n in row["ratios"])
        for n in sorted(names)
    }


def table(report: dict) -> str:
    """The report as the README's table."""
    lines = [
        "| threads | engine | prompt, tokens/s | answer, tokens/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    for threads, row in report["by_threads"].items():
        for name, engine in row["engines"].items():
            if "missing" in engine:
                lines.append(f"| {threads} | {name} | {engine['missing']} | | |")
                continue
            speeds = f"{engine['prefill_tokens_per_s']:.0f} | {engine['decode_tokens_per_s']:.1f}"
            lines.append(f"| {threads} | {name} | {speeds} | {engine['peak_gb']:.2f} GiB |")
        share = f"{row['bandwidth_share']:.0%} of {row['bandwidth_gb_per_s']:.1f} GB/s"
        lines.append(f"| {threads} | ours, memory bandwidth reached | | {share} | |")
    said = ", ".join(f"`{name}` {value:.2f}" for name, value in report["ratios"].items())
    return "\n".join(lines) + f"\n\nRatios, the worse of both numbers of threads: {said}."


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="embeddings to read")
    parser.add_argument("--tokens", type=int, default=24, help="to say after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if not (args.work / "bundle" / "manifest.json").exists():
        raise DataError(
            f"{args.work} holds no bundle: run python -m benchmarks.studies.full_size first"
        )
    report = {
        "machine": describe(),
        "date": str(date.today()),
        "command": f"{COMMAND} --rounds {args.rounds}",
        "versions": versions(),
    }
    report |= {"shape": args.shape, "prompt": args.prompt, "rounds": args.rounds, "by_threads": {}}
    total = len(args.threads) * len(args.peers) * (args.rounds + 1)
    with tqdm(total=total, desc="turns", file=sys.stderr) as bar:
        for threads in args.threads:
            report["by_threads"][str(threads)] = compare(args, threads, bar)
    report["ratios"] = worst(report["by_threads"])
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
