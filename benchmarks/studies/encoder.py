"""An encoder of wav2vec2-base's shape: ONNX Runtime beside PyTorch, and what INT8 costs.

    python -m benchmarks.studies.encoder [--threads 1 2] [--seconds 10] [--digits FOLDER] [--json]

Speed is measured in FP32 and INT8 beside PyTorch eager, with random weights; all sides take turns,
medians. Accuracy is that of the shipped encoder, which is trained, on the shipped recordings and on
those of `--digits`, a folder of speakers, each a data set. Writes benchmarks/results/encoder.json;
the last line of stdout is the same document.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.harness import StoppingRule, alternate, make_side, spread
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.pipelines import WEIGHTS
from tiny_align.benchmarks.standard.speakers import data_folders
from tiny_align.engines.measure import cosine
from tiny_align.export.bundle import write_encoder
from tiny_align.export.encoders import load_encoder
from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference.build import ENCODER_LAYERS
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec, write_manifest
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "encoder.json"
COMMAND = "python -m benchmarks.studies.encoder"
BACKEND = "onnxruntime"
PRECISIONS = ("fp32", "int8")
SAMPLE_RATE = 16_000  # Hz


def make_encoder(folder: Path, **sizes: Any) -> Path:
    """A random wav2vec2 in transformers' form; its sizes are wav2vec2-base's unless given."""
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def export(source: Path, folder: Path, layers: tuple[int, ...] = (-1,)) -> dict[str, Path]:
    """The encoder in every precision, each in a folder with its description in spec.json."""
    encoder = load_encoder(str(source), layers)
    exported = {}
    for precision in tqdm(PRECISIONS, desc="export"):
        target = folder / precision
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
            spec = write_encoder(target, encoder, precision)
        write_json(target / "spec.json", dataclasses.asdict(spec))
        exported[precision] = target
    return exported


def load(folder: Path, threads: int) -> Runner:
    spec = GraphSpec(**json.loads((folder / "spec.json").read_text())).on(BACKEND)
    return load_runner(folder / spec.file, spec, BACKEND, threads)


def speed(
    source: Path, exported: dict[str, Path], threads: int, audio_s: float, repeats: int
) -> dict[str, Any]:
    """Seconds of all sides for the same noise, one after the other in every repeat."""
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((1, round(audio_s * SAMPLE_RATE))).astype(np.float32)
    torch.set_num_threads(threads)
    model = load_pretrained(transformers.Wav2Vec2Model, source).eval()
    sides = {}
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for precision, folder in exported.items():
            runner = stack.enter_context(load(folder, threads))
            sides[precision] = make_side(functools.partial(runner, {"input_values": audio}))
        sides["pytorch"] = make_side(lambda: model(torch.from_numpy(audio)))
        samples = alternate(sides, StoppingRule(min_rounds=repeats, max_rounds=repeats))

    medians = {}
    p90 = {}
    for name, side in samples.items():
        seconds = spread(side["seconds"])
        medians[name] = seconds["median"]
        p90[name] = seconds["p90"]
    ratios = {}
    for precision in exported:
        ratios[f"{precision}_vs_pytorch"] = medians["pytorch"] / medians[precision]
    return {"seconds": medians, "seconds_p90": p90, "ratios": ratios, "repeats": repeats}


def distance(features: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, Any]:
    """How far features (N, Da) of several recordings are from the exact ones."""
    cosines = []
    frame_cosines = []
    errors = []
    for a, b in zip(features, exact, strict=True):
        cosines.append(cosine(a, b))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        frame_cosines.append((a * b).sum(1) / norms)
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return {
        "cosine": float(np.mean(cosines)),
        "least_cosine": min(cosines),
        "least_cosine_of_a_frame": float(np.concatenate(frame_cosines).min()),
        "relative_error": float(np.mean(errors)),
        "recordings": len(cosines),
    }


def random_accuracy(
    source: Path, exported: dict[str, Path], threads: int, recordings: list[np.ndarray]
) -> dict[str, Any]:
    """INT8 against FP32 on recordings (S,) float32, by the encoder with random weights."""
    front_end = load_encoder(str(source)).front_end
    inputs = [front_end(audio)[None] for audio in recordings]
    features = {}
    for precision, folder in exported.items():
        with load(folder, threads) as run:
            features[precision] = [run({"input_values": x})["features"][0] for x in inputs]
    return distance(features["int8"], features["fp32"])


def shipped_accuracy(folder: Path, threads: int, data: dict[str, list]) -> dict[str, dict]:
    """The shipped bundle with its encoder in INT8 against itself, by the general projector."""
    int8_bundle = quantise_encoder(shipped("bundle"), folder)
    rows = {}
    with (
        Assistant.load(shipped("bundle"), threads=threads) as fp32,
        Assistant.load(int8_bundle, threads=threads) as int8,
    ):
        for name, utterances in data.items():
            rows[name] = compare_assistants(fp32, int8, utterances)
    return rows


def compare_assistants(fp32: Assistant, int8: Assistant, utterances: list) -> dict[str, Any]:
    """Features and answers of one assistant against those of another."""
    recordings = [utterance.load(SAMPLE_RATE) for utterance in utterances]
    features_int8 = [int8.features(audio) for audio in recordings]
    features_fp32 = [fp32.features(audio) for audio in recordings]
    quality_fp32 = evaluate(fp32, utterances)
    quality_int8 = evaluate(int8, utterances)
    n_equal = 0
    for row_fp32, row_int8 in zip(quality_fp32.rows, quality_int8.rows, strict=True):
        n_equal += row_fp32["spoken"] == row_int8["spoken"]
    return distance(features_int8, features_fp32) | {
        "same_answers": n_equal / len(utterances),
        "rougeL": {"fp32": quality_fp32.rougeL, "int8": quality_int8.rougeL},
        "wer": {"fp32": quality_fp32.wer, "int8": quality_int8.wer},
    }


def quantise_encoder(bundle: Path, folder: Path) -> Path:
    """A copy of the shipped bundle, its encoder exported again in INT8."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("users", "engines", "encoder.*"))
    encoder = load_encoder(str(WEIGHTS / "encoder"), ENCODER_LAYERS)
    with contextlib.redirect_stdout(sys.stderr):
        spec = write_encoder(folder, encoder, "int8")
    manifest = Bundle.open(bundle).manifest
    graphs = {**manifest.graphs, "encoder": spec}
    write_manifest(folder, dataclasses.replace(manifest, graphs=graphs))
    return folder


def table(report: dict[str, Any]) -> str:
    """The report as the README's tables."""
    head = [f"threads, {report['audio_s']:g} s of audio", "PyTorch FP32"]
    head += [f"ONNX Runtime {precision}" for precision in PRECISIONS]
    rows = []
    for threads, row in report["speed"].items():
        seconds = row["seconds"]
        cells = [threads, f"{seconds['pytorch']:.2f} s"]
        for precision in PRECISIONS:
            ratio = row["ratios"][f"{precision}_vs_pytorch"]
            cells.append(f"{seconds[precision]:.2f} s, {ratio:.2f}x")
        rows.append(cells)
    return f"{grid(head, rows)}\n\n{accuracy_table(report)}"


def accuracy_table(report: dict[str, Any]) -> str:
    """What INT8 costs."""
    head = [
        "INT8 against FP32",
        "cosine",
        "minimum of a frame",
        "relative error",
        "same answers",
        "ROUGE-L",
        "WER",
    ]
    rows = [["random wav2vec2-base", *_distance_cells(report["random"]), "", "", ""]]
    for name, row in report["shipped"].items():
        cells = [f"shipped encoder, {name}", *_distance_cells(row)]
        cells.append(f"{row['same_answers']:.0%} of {row['recordings']}")
        for figure in (row["rougeL"], row["wer"]):
            cells.append(f"{figure['fp32']:.3f} -> {figure['int8']:.3f}")
        rows.append(cells)
    return grid(head, rows)


def _distance_cells(row: dict[str, Any]) -> list[str]:
    names = ("cosine", "least_cosine_of_a_frame", "relative_error")
    return [f"{row[name]:.4f}" for name in names]


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--digits", type=Path, help="a folder of speakers, each a data set")
    args = parser.parse_args(argv)
    report = stamp(COMMAND + (" --digits FOLDER" if args.digits else ""))
    report["audio_s"] = args.seconds
    data = {}
    recordings = []
    for folder in data_folders(args.digits):
        test = [u for u in load_dataset(folder) if u.split == "test"]
        data[folder.name] = test
        recordings += [u.load(SAMPLE_RATE) for u in test[::10]]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = make_encoder(work / "source")
        exported = export(source, work / "exported")
        report["speed"] = {}
        for threads in sorted(set(args.threads)):
            row = speed(source, exported, threads, args.seconds, args.repeats)
            report["speed"][str(threads)] = row
        report["random"] = random_accuracy(source, exported, min(args.threads), recordings)
        report["shipped"] = shipped_accuracy(work / "bundle", min(args.threads), data)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
