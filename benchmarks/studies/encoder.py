"""A wav2vec2-base-shaped encoder: ONNX Runtime beside PyTorch eager in FP32, and what INT8 costs on speech.

    python -m benchmarks.studies.encoder [--threads 1 2] [--seconds 10] [--digits FOLDER] [--json]

Random weights for the speed: both sides in turn, medians. The shipped encoder, which is trained, for the
accuracy, on the shipped recordings and on `--digits`, a folder of speakers, each a data set. Writes
benchmarks/results/encoder.json; the last line of stdout is the same document.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks import finish
from tiny_align.benchmarks.standard.harness import Patience, alternate, spread, timed
from tiny_align.benchmarks.studies.alignment import WEIGHTS
from tiny_align.export.bundle import write_encoder
from tiny_align.export.encoders import load_encoder
from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference.build import ENCODER_LAYERS
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import GraphSpec, write_manifest
from tiny_align.runtime.files import write_json
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "encoder.json"
COMMAND = "python -m benchmarks.studies.encoder"
BACKEND, PRECISIONS = "onnxruntime", ("fp32", "int8")
SAMPLE_RATE = 16_000  # Hz


def make_encoder(folder: Path, **sizes) -> Path:
    """A random wav2vec2, of wav2vec2-base's sizes unless told otherwise, in transformers' form."""
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def export(source: Path, folder: Path, layers: tuple[int, ...] = (-1,)) -> dict[str, Path]:
    """The encoder in every precision, each in a folder of its own with its description in spec.json."""
    encoder = load_encoder(str(source), layers)
    for precision in tqdm(PRECISIONS, desc="export"):
        (folder / precision).mkdir(parents=True)
        with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
            spec = write_encoder(folder / precision, encoder, precision)
        write_json(folder / precision / "spec.json", dataclasses.asdict(spec))
    return {precision: folder / precision for precision in PRECISIONS}


def load(folder: Path, threads: int):
    spec = GraphSpec(**json.loads((folder / "spec.json").read_text())).on(BACKEND)
    return load_runner(folder / spec.file, spec, BACKEND, threads)


def speed(
    source: Path, exported: dict[str, Path], threads: int, audio_s: float, repeats: int
) -> dict:
    """Seconds of both sides for the same noise, one after the other in every repeat; a run before warms up."""
    audio = (
        np.random.default_rng(0)
        .standard_normal((1, round(audio_s * SAMPLE_RATE)))
        .astype(np.float32)
    )
    torch.set_num_threads(threads)
    model = load_pretrained(transformers.Wav2Vec2Model, source).eval()
    with contextlib.ExitStack() as stack, torch.inference_mode():
        runners = {
            name: stack.enter_context(load(folder, threads)) for name, folder in exported.items()
        }
        sides = {
            name: (lambda run=run: run({"input_values": audio})) for name, run in runners.items()
        }
        sides["pytorch"] = lambda: model(torch.from_numpy(audio))
        patience = Patience(least=repeats, most=repeats)
        samples = alternate({name: timed(run) for name, run in sides.items()}, patience)
    taken = {name: spread(side["seconds"]) for name, side in samples.items()}
    seconds, p90 = ({name: row[key] for name, row in taken.items()} for key in ("median", "p90"))
    ratios = {f"{name}_vs_pytorch": seconds["pytorch"] / seconds[name] for name in exported}
    return {"seconds": seconds, "seconds_p90": p90, "ratios": ratios, "repeats": repeats}


def distance(features: list[np.ndarray], exact: list[np.ndarray]) -> dict:
    """How far features (N, Da) of several recordings are from the exact ones."""
    pairs = list(zip(features, exact, strict=True))
    cosines = [float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
    frames = [
        (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1) for a, b in pairs
    ]
    return {
        "cosine": float(np.mean(cosines)),
        "least_cosine": min(cosines),
        "least_cosine_of_a_frame": float(np.concatenate(frames).min()),
        "relative_error": float(np.mean(errors)),
        "recordings": len(pairs),
    }


def random_accuracy(
    source: Path, exported: dict[str, Path], threads: int, recordings: list[np.ndarray]
) -> dict:
    """INT8 against FP32 on recordings (S,) float32, by the encoder with random weights."""
    front_end, features = load_encoder(str(source)).front_end, {}
    for name, folder in exported.items():
        with load(folder, threads) as run:
            features[name] = [
                run({"input_values": front_end(audio)[None]})["features"][0] for audio in recordings
            ]
    return distance(features["int8"], features["fp32"])


def shipped_accuracy(folder: Path, threads: int, data: dict[str, list]) -> dict:
    """The shipped bundle with its encoder in INT8 against itself: features, and answers by the general projector."""
    quantised, rows = quantise_encoder(shipped("bundle"), folder), {}
    with (
        Assistant.load(shipped("bundle"), threads=threads) as exact,
        Assistant.load(quantised, threads=threads) as rough,
    ):
        for name, utterances in data.items():
            audios = [u.load(SAMPLE_RATE) for u in utterances]
            features = [[a.features(audio) for audio in audios] for a in (rough, exact)]
            quality = {
                p: evaluate(a, utterances) for p, a in zip(PRECISIONS, (exact, rough), strict=True)
            }
            said = [[row["spoken"] for row in quality[p].rows] for p in PRECISIONS]
            rows[name] = distance(*features) | {
                "same_answers": sum(a == b for a, b in zip(*said, strict=True)) / len(utterances),
                "rougeL": {p: q.rougeL for p, q in quality.items()},
                "wer": {p: q.wer for p, q in quality.items()},
            }
    return rows


def quantise_encoder(bundle: Path, folder: Path) -> Path:
    """A copy of the shipped bundle, its encoder exported again in INT8."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("users", "engines", "encoder.*"))
    manifest = Bundle.open(bundle).manifest
    with contextlib.redirect_stdout(sys.stderr):
        spec = write_encoder(folder, load_encoder(str(WEIGHTS / "encoder"), ENCODER_LAYERS), "int8")
    write_manifest(
        folder, dataclasses.replace(manifest, graphs={**manifest.graphs, "encoder": spec})
    )
    return folder


def table(report: dict) -> str:
    """The report as the README's tables."""
    head = [
        f"threads, {report['audio_s']:g} s of audio",
        "PyTorch FP32",
        *(f"ONNX Runtime {p}" for p in PRECISIONS),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for threads, row in report["speed"].items():
        ours = [
            f"{row['seconds'][p]:.2f} s, {row['ratios'][f'{p}_vs_pytorch']:.2f}x"
            for p in PRECISIONS
        ]
        lines.append(
            f"| {threads} | {row['seconds']['pytorch']:.2f} s | " + " | ".join(ours) + " |"
        )
    head = [
        "INT8 against FP32",
        "cosine",
        "least of a frame",
        "relative error",
        "same answers",
        "ROUGE-L",
        "WER",
    ]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = {"random wav2vec2-base": report["random"]} | {
        f"shipped encoder, {name}": row for name, row in report["shipped"].items()
    }
    for name, row in rows.items():
        figures = [row["cosine"], row["least_cosine_of_a_frame"], row["relative_error"]]
        lines.append(
            f"| {name} | " + " | ".join(f"{f:.4f}" for f in figures) + f" | {_answers(row)} |"
        )
    return "\n".join(lines)


def _answers(row: dict) -> str:
    if "wer" not in row:
        return " | | "
    changes = [f"{row[name]['fp32']:.3f} -> {row[name]['int8']:.3f}" for name in ("rougeL", "wer")]
    return " | ".join([f"{row['same_answers']:.0%} of {row['recordings']}", *changes])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    command = COMMAND + (" --digits FOLDER" if args.digits else "")
    report = {
        "machine": describe(),
        "date": str(date.today()),
        "command": command,
        "audio_s": args.seconds,
    }
    folders = [
        shipped("voice"),
        *(sorted(p for p in args.digits.iterdir() if p.is_dir()) if args.digits else ()),
    ]
    data = {path.name: [u for u in load_dataset(path) if u.split == "test"] for path in folders}
    recordings = [u.load(SAMPLE_RATE) for utterances in data.values() for u in utterances[::10]]
    with tempfile.TemporaryDirectory() as temporary:
        source = make_encoder(Path(temporary) / "source")
        exported = export(source, Path(temporary) / "exported")
        report["speed"] = {
            str(n): speed(source, exported, n, args.seconds, args.repeats)
            for n in sorted(set(args.threads))
        }
        report["random"] = random_accuracy(source, exported, min(args.threads), recordings)
        report["shipped"] = shipped_accuracy(Path(temporary) / "bundle", min(args.threads), data)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
