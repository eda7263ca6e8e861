"""What a board answers, how fast and in how much memory; jetson.sh calls it, step by step.

    python -m benchmarks.studies.jetson can build|tensorrt              # exit status 3 and the reason, where it cannot
    python -m benchmarks.studies.jetson measure --backend NAME --out DIR [--bundle DIR] [--data DIR] [--limit N]
    python -m benchmarks.studies.jetson compare --out DIR               # exit status 1 where a backend is not on a par
    python -m benchmarks.studies.jetson report --out DIR

A backend is measured in a process of its own. The last line of stdout is a JSON document; jetson.sh puts it into DIR,
where `compare` and `report` look for it, and `measure` leaves the features beside it. Unlike the other benchmarks it
writes nothing into benchmarks/results: the results are the board's.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks.standard.pipelines import reason_against_tensorrt
from tiny_align.engines.build_one import peak_memory_bytes
from tiny_align.engines.builder import find_builder
from tiny_align.runtime.assistant import Answer, Assistant
from tiny_align.runtime.backends.registry import names
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.machine import describe, memory

REFERENCE = Path(__file__).parents[2] / "reference"
RECORDED = Path(__file__).parents[1] / "results" / "quality.json"
EXACT, TENSORRT = "onnxruntime", "tensorrt"
CANNOT = 3  # exit status
VOICE = "slt"  # whose recordings ship
MIN_COSINE, MAX_LOSS = 0.99, 0.02  # of features; of ROUGE-L


def reason_against(what: str) -> str | None:
    """Why this machine cannot build engines, or run them; None if it can."""
    if what != "build":
        return reason_against_tensorrt()
    try:
        find_builder(None)
    except TinyAlignError as error:
        return str(error)
    return None


# --- one backend ---


def measure(folder: Path, backend: str, bundle: Path, data: Path, limit: int | None) -> dict:
    """Latency, memory and quality of a backend; its features of every recording go into an .npz."""
    utterances = split_of(load_dataset(data), "test")
    before, began = memory(), time.perf_counter()
    with Assistant.load(bundle, backend=backend) as assistant:
        load_s = time.perf_counter() - began
        chosen = utterances[:limit]
        audio = [utterance.load(assistant.sample_rate) for utterance in chosen]
        assistant.answer(audio[0])  # warms up
        features, cold_s = timed_features(assistant, audio)
        answers = [assistant.answer(one) for one in tqdm(audio, desc="answer")]
        _, warm_s = timed_features(assistant, audio)
        after = memory()
        result = latency(answers) | {
            "load_s": load_s,
            "encoder_s": cold_s,
            "encoder_after_answers_s": warm_s,
        }
        result["quality"] = _quality(evaluate(assistant, chosen))
    np.savez(folder / f"{backend}.npz", **{str(i): rows for i, rows in enumerate(features)})
    return result | {
        "backend": backend,
        "recordings": len(chosen),
        "shipped": _is_shipped(bundle, data) and len(chosen) == len(utterances),
        "texts": [answer.text for answer in answers],
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_taken_bytes": before.get("MemAvailable", 0)
        - after.get("MemAvailable", 0),  # on a Jetson the GPU takes of it
        "memory_before": before,
        "memory_after": after,
    }


def timed_features(assistant: Assistant, audio: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """(N, Da) features of each recording, and the median of the seconds taken for one."""
    features, seconds = [], []
    for one in audio:
        began = time.perf_counter()
        features.append(assistant.features(one))
        seconds.append(time.perf_counter() - began)
    return features, statistics.median(seconds)


def latency(answers: list[Answer]) -> dict:
    """Median and 90th percentile over the answers in which something was heard."""
    heard = [answer for answer in answers if answer.heard] or answers
    steps = [(a.seconds - a.ttft_s) / (len(a.tokens) - 1) for a in heard if len(a.tokens) > 1]
    told = {
        "ttft_ms": [1000 * a.ttft_s for a in heard],
        "ms_per_token": [1000 * s for s in steps] or [float("nan")],
    }
    told["rtf"] = [a.rtf for a in heard]
    return {
        name: {"median": statistics.median(values), "p90": float(np.quantile(values, 0.9))}
        for name, values in told.items()
    }


def _quality(result) -> dict:
    return {name: getattr(result, name) for name in ("rougeL", "rougeL_chance", "wer")}


def _is_shipped(bundle: Path, data: Path) -> bool:
    """Whether figures of the reference hold: the shipped recordings, and a bundle of the same files."""
    files = [
        Bundle.open(path, verify=False).manifest.files for path in (bundle, REFERENCE / "bundle")
    ]
    return data.resolve() == (REFERENCE / "voice").resolve() and files[0] == files[1]


# --- what was measured, side by side ---


def compare(folder: Path) -> dict:
    """Every backend measured against ONNX Runtime and, if the bundle and the recordings ship, against our figures."""
    measured = _measured(folder)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["new_voices"][VOICE][
        "rougeL_before"
    ]
    rows = {}
    for name, result in measured.items():
        row = {"rougeL": result["quality"]["rougeL"]}
        if result["shipped"]:
            row["loss_to_reference"] = recorded - row["rougeL"]
        if name != EXACT and EXACT in measured:
            row |= against_exact(folder, name, result, measured[EXACT])
        rows[name] = row | {"on_a_par": on_a_par(row)}
    return rows


def against_exact(folder: Path, name: str, result: dict, exact: dict) -> dict:
    cosines = [
        _cosine(a, b)
        for a, b in zip(_features(folder, name), _features(folder, EXACT), strict=True)
    ]
    same = [a == b for a, b in zip(result["texts"], exact["texts"], strict=True)]
    return {
        "least_cosine": min(cosines),
        "same_answers": sum(same) / len(same),
        "loss": exact["quality"]["rougeL"] - result["quality"]["rougeL"],
    }


def on_a_par(row: dict) -> bool:
    losses = [row[name] for name in ("loss", "loss_to_reference") if name in row]
    return row.get("least_cosine", 1.0) >= MIN_COSINE and all(loss <= MAX_LOSS for loss in losses)


def _cosine(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.vdot(ours, exact) / np.linalg.norm(ours) / np.linalg.norm(exact))


def _features(folder: Path, backend: str) -> list[np.ndarray]:
    with np.load(folder / f"{backend}.npz", allow_pickle=False) as stored:
        return [stored[str(i)] for i in range(len(stored.files))]


def _measured(folder: Path) -> dict[str, dict]:
    told = {
        name: _document(folder / f"measure-{name}.json")
        for name in dict.fromkeys((EXACT, TENSORRT, *names()))
    }
    return {name: result for name, result in told.items() if result}


def report(folder: Path) -> dict:
    """Everything that the steps left in the folder, as one document."""
    rows = [
        line.split("\t") for line in (folder / "steps.tsv").read_text(encoding="utf-8").splitlines()
    ]
    steps = {name: {"state": state, "reason": reason} for name, state, reason in rows}
    told = {name: _document(folder / f"{name}.json") for name in steps}
    return {
        "machine": describe(),
        "date": date.today().isoformat(),
        "steps": steps,
        "results": told,
    }


def _document(file: Path) -> dict | None:
    """The last line of what a step printed; None of one that failed or was left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return json.loads(lines[-1]) if lines else None


def show(result: dict) -> None:
    for name, step in result["steps"].items():
        print(f"{name:24s} {step['state']:10s} {step['reason']}")
    for name, told in result["results"].items():
        if name.startswith("measure-") and told:
            ttft, token = told["ttft_ms"]["median"], told["ms_per_token"]["median"]
            peak = told["peak_memory_bytes"] / 2**20
            print(
                f"{told['backend']:24s} first token {ttft:.1f} ms, then {token:.2f} ms each, peak memory {peak:.0f} MiB"
            )


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    if args.step == "can":
        reason = reason_against(args.what)
        print(" ".join((reason or "it can").split()))
        return CANNOT if reason else 0
    try:
        result = _run(args)
    except TinyAlignError as error:
        print(f"benchmarks.jetson: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, ensure_ascii=False))
    return int(args.step == "compare" and not all(row["on_a_par"] for row in result.values()))


def _run(args) -> dict:
    if args.step == "measure":
        return measure(args.out, args.backend, args.bundle, args.data, args.limit)
    if args.step == "compare":
        return compare(args.out)
    result = report(args.out)
    show(result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("can").add_argument("what", choices=("build", TENSORRT))
    for name in ("measure", "compare", "report"):
        steps.add_parser(name).add_argument("--out", type=Path, required=True)
    measure_parser = steps.choices["measure"]
    measure_parser.add_argument("--backend", required=True)
    measure_parser.add_argument("--bundle", type=Path, default=REFERENCE / "bundle")
    measure_parser.add_argument("--data", type=Path, default=REFERENCE / "voice")
    measure_parser.add_argument("--limit", type=int, help="so many test recordings only")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
