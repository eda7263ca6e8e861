"""What the rungs of the precision ladder cost and save: accuracy on real audio, answers, and engines for SM 8.6.

    python -m benchmarks.studies.precision [--digits FOLDER] [--layers 2] [--json]

Accuracy is the shipped bundle's: features and answers in every precision against all in FP32, on the test recordings of
the shipped voice and of `--digits`, a folder of speakers, each a data set. INT8 is calibrated on the training
recordings; FP16 is computed by the twins of engines/fp16.py. Engines are TensorRT-RTX's, of the shipped bundle and of
wav2vec2-base beside `--layers` layers of Llama-3.2-1B with its whole output layer, random weights (0: without these;
all 16 in FP32 would take some 20 GB of memory to build). Their bundles stay in work/precision. Writes
benchmarks/results/precision.json; the last line of stdout is the same document.
"""

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tqdm import tqdm

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import EncodedUtterance, encode_utterances, score
from tiny_align.benchmarks import finish
from tiny_align.benchmarks.standard.training_cost import SHAPES
from tiny_align.benchmarks.studies.encoder import distance
from tiny_align.benchmarks.studies.full_size import CONTEXT, make_models
from tiny_align.benchmarks.studies.quantisation import LLM
from tiny_align.engines import fp16
from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.engines.ladder import OWN, RUNGS, Ladder
from tiny_align.engines.measure import METERS, SourceGraph
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.backends.onnxruntime import OrtRunner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.files import link_tree
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "precision.json"
COMMAND = "python -m benchmarks.studies.precision"
WORK = Path("work/precision")
EXACT = (OWN, OWN)
PAIRS = (EXACT, (OWN, "int4"), ("fp16", "int4/fp16"), ("int8", "int4/fp16"))  # of encoder and LLM
LOSSES = {"fp16": 0.01, "int8": 0.02}  # ROUGE-L that an encoder's precision may cost, with its LLM
COMPUTE_CAPABILITY = 86
THREADS = 1
LAYERS = 2  # of Llama-3.2-1B's 16


def with_exact_llm(folder: Path) -> Bundle:
    """The shipped bundle with its LLM in FP32."""
    from tiny_align.export.llms import llm_graph, load_llm

    link_tree(shipped("bundle"), folder)
    manifest = Bundle.open(folder).manifest
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        spec = llm_graph(load_llm(str(LLM))[0]).save(folder / "exact.onnx")
    spec = dataclasses.replace(spec, precision=OWN)
    write_manifest(folder, dataclasses.replace(manifest, graphs={**manifest.graphs, "llm": spec}))
    return Bundle.open(folder)


def accuracy(exact: Bundle, data: dict[str, list], folder: Path) -> dict[str, list[dict]]:
    """Of every data set, a row for each of PAIRS."""
    bundle, rows = Bundle.open(shipped("bundle")), {}
    llms = {OWN: exact.graph("llm"), "int4": bundle.graph("llm")}
    llms["int4/fp16"] = twin_of(bundle, "llm", "fp16", [], folder)
    for name, utterances in tqdm(data.items(), desc="accuracy"):
        training = [
            u.load(bundle.manifest.front_end.sample_rate) for u in split_of(utterances, "train")
        ]
        rungs = {p: twin_of(bundle, "encoder", p, training, folder) for p in RUNGS["encoder"]}
        encoders = {OWN: bundle.graph("encoder"), **rungs}
        chosen = split_of(utterances, "test")
        assistants = {pair: assemble(exact, encoders[pair[0]], llms[pair[1]]) for pair in PAIRS}
        rows[name] = compare(assistants, chosen)
    return rows


def twin_of(bundle: Bundle, name: str, precision: str, audios: list, folder: Path) -> Path:
    graph = SourceGraph(bundle, name, folder)
    model = METERS[name](graph, audios).make_rung(precision)
    return graph.write(fp16.twin(model), f"{name}.{precision}.twin.onnx")


def assemble(bundle: Bundle, encoder: Path, llm: Path) -> Assistant:
    """An assistant of these graphs and the general projector."""
    specs = bundle.manifest.graphs
    # a twin may quantise activations: its file tells
    encoder_spec = dataclasses.replace(specs["encoder"], quantised_activations=None)
    return Assistant(
        bundle,
        OrtRunner(encoder, encoder_spec, THREADS),
        OrtRunner(bundle.graph("projector"), specs["projector"], THREADS),
        LanguageModel(bundle, PlainDecoder(llm, specs["llm"], THREADS)),
        OrtRunner.name,
        THREADS,
    )


def compare(assistants: dict[tuple[str, str], Assistant], utterances: list) -> list[dict]:
    """Features and answers of each against those of EXACT; the typed answers are EXACT's for all."""
    heard, rows = encode_utterances(assistants[EXACT], utterances, quiet=True), []
    audios, said = [u.load(assistants[EXACT].sample_rate) for u in utterances], {}
    for pair, assistant in assistants.items():
        own = [
            EncodedUtterance(h.text, assistant.features(audio), h.typed)
            for h, audio in zip(heard, audios, strict=True)
        ]
        quality = score(assistant, own, quiet=True)
        said[pair] = [row["spoken"] for row in quality.rows]
        row = distance([h.features for h in own], [h.features for h in heard])
        row |= {"encoder": pair[0], "llm": pair[1], "rougeL": quality.rougeL, "wer": quality.wer}
        row["same_answers"] = sum(map(str.__eq__, said[pair], said[EXACT])) / len(utterances)
        rows.append(row)
    return [row | {"loss": rows[0]["rougeL"] - row["rougeL"]} for row in rows]


def engines(bundle: Path, exact: Path, recordings: tuple[Path, ...], folder: Path) -> list[dict]:
    """Every graph of a bundle built on every rung, and the LLM of another in FP32; from links to both."""
    rows = built(exact, Ladder(), ["llm"], folder / "exact")
    rows += built(bundle, Ladder(), None, folder / OWN)
    for precision in RUNGS["encoder"]:
        graphs = [name for name, rungs in RUNGS.items() if precision in rungs]
        rows += built(bundle, Ladder(recordings, precision), graphs, folder / precision)
    return rows


def built(bundle: Path, ladder: Ladder, graphs: list[str] | None, folder: Path) -> list[dict]:
    link_tree(bundle, folder)
    made = build_engines(
        Bundle.open(folder),
        compute_capability=COMPUTE_CAPABILITY,
        graphs=graphs,
        ladder=ladder,
        force=True,
    )
    kept = ("precision", "bytes", "seconds", "peak_memory_bytes", "accuracy")
    return [{"graph": name, **{k: entry[k] for k in kept}} for name, entry in made.items()]


def make_slice(work: Path, layers: int) -> dict[str, Path]:
    """wav2vec2-base and some layers of Llama-3.2-1B, exported in INT4 and in FP32; what is there stays."""
    work.mkdir(parents=True, exist_ok=True)
    make_models(work, dataclasses.replace(SHAPES["llama-3.2-1b"], layers=layers))
    line = [
        "export",
        "--encoder",
        work / "encoder",
        "--llm",
        work / "llm",
        "--sentences",
        work / "sentences.txt",
    ]
    line += ["--max-context", CONTEXT]
    for precision in ("int4", OWN):
        if not (work / precision).is_dir():
            command = [
                sys.executable,
                "-m",
                "tiny_align.runtime.commands.cli",
                *line,
                "--precision",
                precision,
            ]
            command += ["--out", work / precision]
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return {precision: work / precision for precision in ("int4", OWN)}


def table(report: dict) -> str:
    """The report as the README's tables."""
    head = [
        "recordings",
        "encoder",
        "LLM",
        "cosine",
        "least of a recording",
        "same answers",
        "ROUGE-L",
        "loss",
        "WER",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in report["accuracy"].items():
        for row in rows:
            cells = [
                name,
                row["encoder"],
                row["llm"],
                f"{row['cosine']:.5f}",
                f"{row['least_cosine']:.5f}",
            ]
            cells += [f"{row['same_answers']:.0%} of {row['recordings']}", f"{row['rougeL']:.3f}"]
            lines.append(
                "| " + " | ".join([*cells, f"{row['loss']:+.3f}", f"{row['wer']:.3f}"]) + " |"
            )
    head = ["bundle", "graph", "precision", "engine", "of FP32's", "build", "most memory", "cosine"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in report["engines"].items():
        exact = {row["graph"]: row["bytes"] for row in rows if row["precision"] == OWN}
        lines += [f"| {name} | {_engine(row, exact)} |" for row in rows]
    return "\n".join(
        [*lines, "", f"{report['builder']} for compute capability {COMPUTE_CAPABILITY}."]
    )


def _engine(row: dict, exact: dict[str, int]) -> str:
    rung = row["precision"].rpartition("/")[2]
    cosine = f"{row['accuracy'][rung]['cosine']:.5f}" if row["accuracy"] else ""
    cells = [
        row["graph"],
        row["precision"],
        f"{row['bytes'] / 1e6:,.1f} MB",
        f"{row['bytes'] / exact[row['graph']]:.2f}x",
    ]
    return " | ".join(
        [*cells, f"{row['seconds']:.1f} s", f"{row['peak_memory_bytes'] / 1e6:,.0f} MB", cosine]
    )


def command_of(args) -> str:
    """What to type for the same report."""
    digits = " --digits FOLDER" if args.digits else ""
    return COMMAND + digits + (f" --layers {args.layers}" if args.layers != LAYERS else "")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    builder = find_builder(COMPUTE_CAPABILITY)
    report = {
        "machine": describe(),
        "date": str(date.today()),
        "command": command_of(args),
        "layers": args.layers,
    }
    report["builder"] = f"{builder.package} {builder.version}"
    folders = [
        shipped("voice"),
        *(sorted(p for p in args.digits.iterdir() if p.is_dir()) if args.digits else ()),
    ]
    recordings = tuple(sorted(shipped("voice").glob("train-*.flac"))[:8])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exact = with_exact_llm(folder / "bundle")
        (folder / "twins").mkdir()
        report["accuracy"] = accuracy(
            exact, {path.name: load_dataset(path) for path in folders}, folder / "twins"
        )
        bundles = {"reference": (shipped("bundle"), exact.path)}
        if args.layers:
            sliced = make_slice(args.work / str(args.layers), args.layers)
            bundles[f"wav2vec2-base, {args.layers} layers of Llama-3.2-1B"] = (
                sliced["int4"],
                sliced[OWN],
            )
        report["engines"] = {
            name: engines(*pair, recordings, folder / name)
            for name, pair in tqdm(bundles.items(), desc="engines")
        }
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
