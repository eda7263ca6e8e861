"""Latency, memory and quality of each backend on a board; jetson.sh calls it, step by step.

    python -m benchmarks.studies.jetson can build|tensorrt
    python -m benchmarks.studies.jetson measure --backend NAME --out DIR
        [--bundle DIR] [--data DIR] [--limit N]
    python -m benchmarks.studies.jetson compare --out DIR
    python -m benchmarks.studies.jetson report --out DIR

`can` exits with 3 and the reason if the machine cannot; `compare` with 1 if a backend is not on a
par with ONNX Runtime.

A backend is measured in a process of its own. The last line of stdout is a JSON document. jetson.sh
puts it into DIR, where `compare` and `report` find it; `measure` writes the features beside it.
Nothing goes into benchmarks/results: the results are the board's.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks.standard.harness import spread
from tiny_align.benchmarks.standard.pipelines import tensorrt_problem
from tiny_align.benchmarks.standard.processes import peak_memory_bytes
from tiny_align.engines.builder import find_builder
from tiny_align.engines.measure import cosine
from tiny_align.runtime.assistant import Answer, Assistant
from tiny_align.runtime.backends import registry
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.machine import describe, memory

REFERENCE = Path(__file__).parents[2] / "reference"
RECORDED = Path(__file__).parents[1] / "results" / "quality.json"
EXACT = "onnxruntime"  # the backend that the others are compared with
TENSORRT = "tensorrt"
CANNOT = 3  # exit status
VOICE = "slt"  # whose recordings ship
MIN_COSINE = 0.99  # of features
MAX_LOSS = 0.02  # of ROUGE-L


def problem_with(what: str) -> str | None:
    """Why this machine cannot build engines, or run them; None if it can."""
    if what != "build":
        return tensorrt_problem()
    try:
        find_builder(None)
    except TinyAlignError as error:
        return str(error)
    return None


# --- one backend ---


def measure(
    folder: Path, backend: str, bundle: Path, data: Path, limit: int | None
) -> dict[str, Any]:
    """Latency, memory and quality of a backend; its features of every recording go into an .npz."""
    test_split = split_of(load_dataset(data), "test")
    utterances = test_split[:limit]
    memory_before = memory()
    began = time.perf_counter()
    with Assistant.load(bundle, backend=backend) as assistant:
        load_s = time.perf_counter() - began
        recordings = [utterance.load(assistant.sample_rate) for utterance in utterances]
        assistant.answer(recordings[0])  # warms up
        features, encoder_s = timed_features(assistant, recordings)
        answers = [assistant.answer(audio) for audio in tqdm(recordings, desc="answer")]
        _, encoder_after_answers_s = timed_features(assistant, recordings)
        memory_after = memory()
        quality = evaluate(assistant, utterances)
    np.savez(folder / f"{backend}.npz", **{str(i): rows for i, rows in enumerate(features)})
    # on a Jetson the GPU takes of the same memory
    taken = memory_before.get("MemAvailable", 0) - memory_after.get("MemAvailable", 0)
    return latency(answers) | {
        "load_s": load_s,
        "encoder_s": encoder_s,
        "encoder_after_answers_s": encoder_after_answers_s,
        "quality": {
            "rougeL": quality.rougeL,
            "rougeL_chance": quality.rougeL_chance,
            "wer": quality.wer,
        },
        "backend": backend,
        "recordings": len(utterances),
        "shipped": is_shipped(bundle, data) and len(utterances) == len(test_split),
        "texts": [answer.text for answer in answers],
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_taken_bytes": taken,
        "memory_before": memory_before,
        "memory_after": memory_after,
    }


def timed_features(
    assistant: Assistant, recordings: list[np.ndarray]
) -> tuple[list[np.ndarray], float]:
    """(N, Da) features of each recording, and the median of the seconds taken for one."""
    features = []
    seconds = []
    for audio in recordings:
        began = time.perf_counter()
        features.append(assistant.features(audio))
        seconds.append(time.perf_counter() - began)
    return features, statistics.median(seconds)


def latency(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """Median and 90th percentile over the answers to a recognised word."""
    answers = [answer for answer in answers if answer.heard] or answers
    ttft_ms = []
    ms_per_token = []
    real_time_factors = []
    for answer in answers:
        ttft_ms.append(1000 * answer.ttft_s)
        real_time_factors.append(answer.rtf)
        n_steps = len(answer.tokens) - 1
        if n_steps > 0:
            ms_per_token.append(1000 * (answer.seconds - answer.ttft_s) / n_steps)
    figures = {
        "ttft_ms": ttft_ms,
        "ms_per_token": ms_per_token or [float("nan")],
        "rtf": real_time_factors,
    }
    result = {}
    for name, values in figures.items():
        found = spread(values)
        result[name] = {"median": found["median"], "p90": found["p90"]}
    return result


def is_shipped(bundle: Path, data: Path) -> bool:
    """Whether the recordings are the shipped ones, and the bundle has the shipped one's files."""
    files = Bundle.open(bundle, verify=False).manifest.files
    reference_files = Bundle.open(REFERENCE / "bundle", verify=False).manifest.files
    return data.resolve() == (REFERENCE / "voice").resolve() and files == reference_files


# --- the backends side by side ---


def compare(folder: Path) -> dict[str, dict]:
    """Every measured backend against ONNX Runtime and, if all is shipped, against our figures."""
    results = {}
    for name in dict.fromkeys((EXACT, TENSORRT, *registry.names())):
        document = read_document(folder / f"measure-{name}.json")
        if document:
            results[name] = document
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    recorded_rouge = recorded["new_voices"][VOICE]["rougeL_before"]
    rows = {}
    for name, result in results.items():
        row = {"rougeL": result["quality"]["rougeL"]}
        if result["shipped"]:
            row["loss_to_reference"] = recorded_rouge - row["rougeL"]
        if name != EXACT and EXACT in results:
            row |= compare_to_exact(folder, name, result, results[EXACT])
        rows[name] = row | {"on_a_par": is_on_a_par(row)}
    return rows


def compare_to_exact(
    folder: Path, backend: str, result: dict[str, Any], exact: dict[str, Any]
) -> dict[str, float]:
    """A backend's features and answers against those of EXACT."""
    features = read_features(folder, backend)
    exact_features = read_features(folder, EXACT)
    n_equal = 0
    for text, exact_text in zip(result["texts"], exact["texts"], strict=True):
        n_equal += text == exact_text
    return {
        "least_cosine": min(map(cosine, features, exact_features)),
        "same_answers": n_equal / len(exact["texts"]),
        "loss": exact["quality"]["rougeL"] - result["quality"]["rougeL"],
    }


def is_on_a_par(row: dict[str, Any]) -> bool:
    """Whether a backend's features and answers are good enough, as far as they were compared."""
    losses = [row[name] for name in ("loss", "loss_to_reference") if name in row]
    return row.get("least_cosine", 1.0) >= MIN_COSINE and all(loss <= MAX_LOSS for loss in losses)


def read_features(folder: Path, backend: str) -> list[np.ndarray]:
    """What `measure` left of each recording."""
    with np.load(folder / f"{backend}.npz", allow_pickle=False) as stored:
        return [stored[str(i)] for i in range(len(stored.files))]


# --- the report ---


def make_report(folder: Path) -> dict[str, Any]:
    """Everything that the steps left in the folder, as one document."""
    steps = {}
    results = {}
    for line in (folder / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, state, reason = line.split("\t")
        steps[name] = {"state": state, "reason": reason}
        results[name] = read_document(folder / f"{name}.json")
    return {
        "machine": describe(),
        "date": date.today().isoformat(),
        "steps": steps,
        "results": results,
    }


def read_document(file: Path) -> dict[str, Any] | None:
    """The last line of a step's output; None of a step that failed or was left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return json.loads(lines[-1]) if lines else None


def show(report: dict[str, Any]) -> None:
    """Print the steps, and the main figures of each backend."""
    for name, step in report["steps"].items():
        print(f"{name:24s} {step['state']:10s} {step['reason']}")
    for name, result in report["results"].items():
        if name.startswith("measure-") and result:
            ttft_ms = result["ttft_ms"]["median"]
            ms_per_token = result["ms_per_token"]["median"]
            peak_mib = result["peak_memory_bytes"] / 2**20
            print(
                f"{result['backend']:24s} first token {ttft_ms:.1f} ms, "
                f"then {ms_per_token:.2f} ms each, peak memory {peak_mib:.0f} MiB"
            )


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.step == "can":
        problem = problem_with(args.what)
        print(" ".join((problem or "it can").split()))
        return CANNOT if problem else 0
    status = 0
    try:
        if args.step == "measure":
            result = measure(args.out, args.backend, args.bundle, args.data, args.limit)
        elif args.step == "compare":
            result = compare(args.out)
            status = int(not all(row["on_a_par"] for row in result.values()))
        else:
            result = make_report(args.out)
            show(result)
    except TinyAlignError as error:
        print(f"benchmarks.studies.jetson: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, ensure_ascii=False))
    return status


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
    measure_parser.add_argument("--limit", type=int, help="only so many test recordings")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
