"""What fewer bits cost the LLM and save: precisions, algorithms, block sizes, output layers.

    python -m benchmarks.studies.quantisation [--parts llm ...] [--speech FOLDER] [--json]

Parts, each written to the results as soon as it is measured, the others left as they are:

    reference  the reference LLM on held-out typed sentences and on the shipped recordings, as it is
               (it was trained with its weights rounded to INT4 in blocks of 32, so exactly that
               form costs its layers nothing) and off that grid; seconds, bits and speed are those
               of a sixteenth of Llama-3.2-1B with random weights
    llm        the pretrained LLMs of --models off their files' grids: next tokens, bytes, speed,
               what TensorRT refuses; llama.cpp's forms of the same weights
    file       --models' own GGUF files in llama.cpp beside FP32 and beside --exported
    encoder    Moonshine's encoder in FP32, FP16 and INT8, read by its own decoder on --speech

`make pretrained` brings the models. Writes benchmarks/results/quantisation.json; the last line of
stdout is the same document.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.studies.off_grid import off_the_grid
from tiny_align.benchmarks.studies.prompts import PROMPTS
from tiny_align.benchmarks.studies.quantisation_cost import cost
from tiny_align.benchmarks.studies.quantisation_encoder import measure_encoder
from tiny_align.benchmarks.studies.quantisation_llms import measure_file, measure_llm
from tiny_align.benchmarks.studies.quantisation_reference import accuracy
from tiny_align.benchmarks.studies.quantisation_ways import WAYS
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "quantisation.json"
COMMAND = "python -m benchmarks.studies.quantisation"
PRETRAINED = Path(__file__).parents[2] / "reference" / "pretrained"
PARTS = ("reference", "llm", "file", "encoder")
OPTIONS = {  # part of the report -> the options that make it
    "llms": "--parts llm",
    "files": "--parts file --exported BUNDLE",
    "encoder": "--parts encoder --speech FOLDER",
}


def measure_reference(bundle: Path, n_sentences: int, seconds: float) -> dict[str, Any]:
    """The part "reference"."""
    with tempfile.TemporaryDirectory() as folder:
        costs = cost(seconds, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        reference = accuracy(bundle, n_sentences, Path(folder))
    with tempfile.TemporaryDirectory() as folder:  # onnx would append to weights that lie there
        moved = accuracy(bundle, n_sentences, Path(folder), off_the_grid)
    ways = []
    for i, way in enumerate(WAYS):
        figures = {"reference": reference[i], "off_the_grid": moved[i], "cost": costs[i]}
        ways.append(asdict(way) | figures)
    return {"sentences": n_sentences, "ways": ways}


# --- the tables ---


def table(report: dict[str, Any]) -> str:
    """The reference LLM's table of the documents."""
    head = [
        "layers",
        "block",
        "output layer",
        "algorithm",
        "ROUGE-L",
        "spoken",
        "tokens",
        "off the grid: ROUGE-L",
        "tokens",
        "divergence",
        "bits per weight",
        "speed",
        "GB/s",
        "seconds",
    ]
    rows = []
    for way in report.get("ways", []):
        reference = way["reference"]
        moved = way["off_the_grid"]
        costs = way["cost"]
        rows.append(
            [
                way["precision"],
                way["block"] or "",
                way["head"],
                way["algorithm"],
                f"{reference['rougeL']:.4f}",
                f"{reference['spoken_rougeL']:.3f}",
                f"{reference['tokens_equal']:.4f}",
                f"{moved['rougeL']:.4f}",
                f"{moved['tokens_equal']:.4f}",
                f"{moved['divergence']:.5f}",
                f"{costs['bits']:.2f}",
                f"{costs['speed']:.1f}x",
                f"{costs['gb_s']:.1f}",
                f"{costs['quantise_s']:.1f}",
            ]
        )
    return grid(head, rows)


def llm_table(report: dict[str, Any]) -> str:
    """The pretrained LLMs' table of the documents."""
    head = [
        "LLM",
        "layers",
        "block",
        "output layer",
        "algorithm",
        "KL",
        "same next token",
        "bits per weight",
        "MB: layers",
        "output layer",
        "table",
        "tokens/s",
        "TensorRT",
    ]
    rows = []
    for name, part in report.get("models", {}).items():
        for form in part["forms"]:
            rows.append([name, *_form_cells(form)])
    return grid(head, rows)


def _form_cells(form: dict[str, Any]) -> list[str]:
    """A row of `llm_table`, but for the LLM."""
    is_ours = form["runtime"] == "onnxruntime"
    head = f"{form['head_bytes'] / 1e6:.1f}" if is_ours else "is the table"
    refused = "yes" if is_ours and not form["violations"] else "no" if is_ours else ""
    speed = form.get("tokens_per_second")
    return [
        form["precision"],
        str(form.get("block") or ""),
        form.get("head", ""),
        form["algorithm"] if is_ours else "llama.cpp",
        f"{form['divergence']:.4f} ± {form['divergence_error']:.4f}",
        f"{100 * form['same']:.1f} %",
        f"{form['bits']:.2f}",
        f"{form['layers_bytes'] / 1e6:.1f}",
        head,
        f"{form['table_bytes'] / 1e6:.1f}",
        f"{speed:.1f}" if speed else "",
        refused,
    ]


def file_table(report: dict[str, Any]) -> str:
    """One file in two runtimes."""
    head = ["file", "compared", "KL", "same next token"]
    rows = []
    for part in report.get("models", {}).values():
        pairs = {
            "PyTorch in FP32 with llama.cpp": "pytorch",
            "ONNX Runtime with llama.cpp": "bundle",
            "ONNX Runtime with PyTorch": "bundle_pytorch",
        }
        for what, key in pairs.items():
            if key in part:
                figures = part[key]
                same = f"{100 * figures['same']:.1f} %"
                rows.append([part["file"], what, f"{figures['divergence']:.4f}", same])
    return grid(head, rows)


def encoder_table(report: dict[str, Any]) -> str:
    """Moonshine's encoder."""
    head = ["encoder", "MB", "cosine: mean", "min", "WER", "CER", "transcripts as FP32's"]
    rows = []
    for name, form in report.get("forms", {}).items():
        rows.append(
            [
                name,
                f"{form['bytes'] / 1e6:.1f}",
                f"{form['cosine']:.5f}",
                f"{form['min_cosine']:.5f}",
                f"{100 * form['wer']:.1f} %",
                f"{100 * form['cer']:.1f} %",
                f"{100 * form['texts_equal']:.0f} %",
            ]
        )
    return grid(head, rows)


# part of the report -> its table
TABLES = {"llms": llm_table, "files": file_table, "encoder": encoder_table}


# --- the program ---


class Study:
    """The report, written to its file whenever a part of it is new."""

    def __init__(self, path: Path):
        self._path = path
        self.report: dict[str, Any] = {}
        if path.exists():
            self.report = json.loads(path.read_text(encoding="utf-8"))

    def add(self, key: str, value: dict[str, Any], name: str | None = None) -> None:
        """Set a part, or one model's in it, with where and when it was measured."""
        part = self.report.setdefault(key, {})
        part |= stamp(f"{COMMAND} {OPTIONS[key]}")
        if name is None:
            part |= value
        else:
            part.setdefault("models", {})[name] = value
        self.save()

    def save(self) -> None:
        write_json(self._path, self.report)


@contextlib.contextmanager
def work_folder(work: Path | None, name: str) -> Iterator[Path]:
    """A folder for a model's graphs: in `work`, where they stay, or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    (work / name).mkdir(parents=True, exist_ok=True)
    yield work / name


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--sentences", type=int, default=200)
    default_models = [PRETRAINED / "smollm2-135m-instruct"]
    parser.add_argument(
        "--models", type=Path, nargs="+", default=default_models, help="checkpoints of LLMs"
    )
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument(
        "--exported", type=Path, help="a bundle exported from the only model's own GGUF file"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="keep graphs and figures of the part llm here, and go on from them",
    )
    parser.add_argument("--encoder", type=Path, default=PRETRAINED / "moonshine-tiny")
    parser.add_argument("--speech", type=Path, help="a data set with a test split")
    parser.add_argument("--utterances", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=40, help="for the timing of all forms together"
    )
    args = parser.parse_args(argv)
    study = Study(args.out)
    if "reference" in args.parts:
        part = measure_reference(args.bundle, args.sentences, args.seconds)
        study.report |= stamp(COMMAND) | part
        study.save()
    for source in args.models:
        if "llm" in args.parts:
            with work_folder(args.work, source.name) as folder:
                save = functools.partial(study.add, "llms", name=source.name)
                save(measure_llm(source, folder, args.seconds, args.prompts, save))
        if "file" in args.parts:
            part = measure_file(source, args.exported, args.prompts)
            study.add("files", part, source.name)
    if "encoder" in args.parts and args.speech:
        with tempfile.TemporaryDirectory() as folder:
            part = measure_encoder(args.encoder, args.speech, args.utterances, Path(folder))
        study.add("encoder", part)
    tables = [table(study.report)]
    for key, show in TABLES.items():
        tables.append(show(study.report.get(key, {})))
    return finish(study.report, args, "\n\n".join(tables))


if __name__ == "__main__":
    raise SystemExit(main())
