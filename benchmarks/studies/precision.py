"""What each precision that may be selected costs and saves: accuracy, answers, engines.

    python -m benchmarks.studies.precision [--digits FOLDER] [--layers 2] [--json]

Accuracy is the shipped bundle's on real audio: features and answers in every precision against all
in FP32, on the test recordings of the shipped voice and of `--digits`, a folder of speakers, each a
data set. INT8 is calibrated on the training recordings; FP16 is computed by the twins of
engines/fp16.py.

Engines are TensorRT-RTX's for SM 8.6: of the shipped bundle, and of wav2vec2-base beside `--layers`
layers of Llama-3.2-1B with its whole output layer, random weights (0: without these; all 16 in FP32
would take some 20 GB of memory to build). Their bundles stay in work/precision. Writes
benchmarks/results/precision.json; the last line of stdout is the same document.
"""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import EncodedUtterance, encode_utterances, score
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.speakers import data_folders
from tiny_align.benchmarks.standard.training_cost import SHAPES
from tiny_align.benchmarks.studies.encoder import distance
from tiny_align.benchmarks.studies.full_size import make_models, run_export
from tiny_align.benchmarks.studies.quantisation_reference import LLM
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
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import link_tree
from tiny_align.runtime.llm import LanguageModel

RESULTS = Path(__file__).parents[1] / "results" / "precision.json"
COMMAND = "python -m benchmarks.studies.precision"
WORK = Path("work/precision")
EXACT = (OWN, OWN)
PAIRS = (EXACT, (OWN, "int4"), ("fp16", "int4/fp16"), ("int8", "int4/fp16"))  # of encoder and LLM
COMPUTE_CAPABILITY = 86
THREADS = 1
LAYERS = 2  # of Llama-3.2-1B's 16
N_CALIBRATION = 8  # shipped recordings for the engines' INT8
COLUMNS = ("precision", "bytes", "seconds", "peak_memory_bytes", "accuracy")  # of the builder


# --- accuracy ---


def with_exact_llm(folder: Path) -> Bundle:
    """The shipped bundle with its LLM in FP32."""
    from tiny_align.export.llms import llm_graph, load_llm

    link_tree(shipped("bundle"), folder)
    manifest = Bundle.open(folder).manifest
    llm, _ = load_llm(str(LLM))
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        spec = llm_graph(llm).save(folder / "exact.onnx")
    graphs = {**manifest.graphs, "llm": dataclasses.replace(spec, precision=OWN)}
    write_manifest(folder, dataclasses.replace(manifest, graphs=graphs))
    return Bundle.open(folder)


def accuracy(exact: Bundle, data: dict[str, list], folder: Path) -> dict[str, list[dict]]:
    """Of every data set, a row for each of PAIRS; the twins are written into `folder`."""
    bundle = Bundle.open(shipped("bundle"))
    sample_rate = bundle.manifest.front_end.sample_rate
    llms = {
        OWN: exact.graph("llm"),
        "int4": bundle.graph("llm"),
        "int4/fp16": write_twin(bundle, "llm", "fp16", [], folder),
    }
    rows = {}
    for name, utterances in tqdm(data.items(), desc="accuracy"):
        calibration = [u.load(sample_rate) for u in split_of(utterances, "train")]
        encoders = {OWN: bundle.graph("encoder")}
        for precision in RUNGS["encoder"]:
            encoders[precision] = write_twin(bundle, "encoder", precision, calibration, folder)
        assistants = {}
        for encoder, llm in PAIRS:
            assistants[encoder, llm] = assemble(exact, encoders[encoder], llms[llm])
        rows[name] = compare(assistants, split_of(utterances, "test"))
    return rows


def write_twin(
    bundle: Bundle, name: str, precision: str, calibration: list[np.ndarray], folder: Path
) -> Path:
    """A graph of the bundle in another precision, as ONNX Runtime computes it."""
    graph = SourceGraph(bundle, name, folder)
    model = METERS[name](graph, calibration).make_rung(precision)
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
    """Features and answers of each against those of EXACT, whose typed answers all use."""
    exact = encode_utterances(assistants[EXACT], utterances, quiet=True)
    exact_features = [utterance.features for utterance in exact]
    recordings = [u.load(assistants[EXACT].sample_rate) for u in utterances]
    rows: list[dict] = []
    for (encoder, llm), assistant in assistants.items():
        encoded = []
        for utterance, audio in zip(exact, recordings, strict=True):
            features = assistant.features(audio)
            encoded.append(EncodedUtterance(utterance.text, features, utterance.typed))
        quality = score(assistant, encoded, quiet=True)
        answers = [row["spoken"] for row in quality.rows]
        if not rows:  # PAIRS begins with EXACT
            exact_answers = answers
            exact_rouge = quality.rougeL
        n_equal = sum(map(str.__eq__, answers, exact_answers))
        row = distance([utterance.features for utterance in encoded], exact_features)
        row |= {
            "encoder": encoder,
            "llm": llm,
            "rougeL": quality.rougeL,
            "wer": quality.wer,
            "same_answers": n_equal / len(utterances),
            "loss": exact_rouge - quality.rougeL,
        }
        rows.append(row)
    return rows


# --- engines ---


def engines(bundle: Path, exact: Path, recordings: tuple[Path, ...], folder: Path) -> list[dict]:
    """Every graph of a bundle in every precision, and the LLM of another in FP32."""
    rows = build(exact, Ladder(), ["llm"], folder / "exact")
    rows += build(bundle, Ladder(), None, folder / OWN)
    for precision in RUNGS["encoder"]:
        graphs = [name for name, rungs in RUNGS.items() if precision in rungs]
        rows += build(bundle, Ladder(recordings, precision), graphs, folder / precision)
    return rows


def build(bundle: Path, ladder: Ladder, graphs: list[str] | None, folder: Path) -> list[dict]:
    """Build engines of a bundle's graphs (None: of all) in a folder of links; the reports."""
    link_tree(bundle, folder)
    entries = build_engines(
        Bundle.open(folder),
        compute_capability=COMPUTE_CAPABILITY,
        graphs=graphs,
        ladder=ladder,
        force=True,
    )
    rows = []
    for name, entry in entries.items():
        rows.append({"graph": name} | {column: entry[column] for column in COLUMNS})
    return rows


def make_slice(work: Path, layers: int) -> dict[str, Path]:
    """wav2vec2-base and some layers of Llama-3.2-1B, exported in INT4 and in FP32 if not yet."""
    work.mkdir(parents=True, exist_ok=True)
    make_models(work, dataclasses.replace(SHAPES["llama-3.2-1b"], layers=layers))
    bundles = {}
    for precision in ("int4", OWN):
        bundles[precision] = work / precision
        if not bundles[precision].is_dir():
            run_export(work, bundles[precision], "--precision", precision)
    return bundles


# --- the report ---


def table(report: dict[str, Any]) -> str:
    """The report as the README's tables."""
    tables = [accuracy_table(report["accuracy"]), engines_table(report["engines"])]
    note = f"{report['builder']} for compute capability {COMPUTE_CAPABILITY}."
    return "\n\n".join([*tables, note])


def accuracy_table(accuracy: dict[str, list[dict]]) -> str:
    head = [
        "recordings",
        "encoder",
        "LLM",
        "cosine",
        "minimum of a recording",
        "same answers",
        "ROUGE-L",
        "loss",
        "WER",
    ]
    cells = []
    for name, rows in accuracy.items():
        for row in rows:
            cells.append(
                [
                    name,
                    row["encoder"],
                    row["llm"],
                    f"{row['cosine']:.5f}",
                    f"{row['least_cosine']:.5f}",
                    f"{row['same_answers']:.0%} of {row['recordings']}",
                    f"{row['rougeL']:.3f}",
                    f"{row['loss']:+.3f}",
                    f"{row['wer']:.3f}",
                ]
            )
    return grid(head, cells)


def engines_table(engines: dict[str, list[dict]]) -> str:
    head = [
        "bundle",
        "graph",
        "precision",
        "engine",
        "of FP32's",
        "build",
        "peak memory",
        "cosine",
    ]
    cells = []
    for name, rows in engines.items():
        exact_bytes = {row["graph"]: row["bytes"] for row in rows if row["precision"] == OWN}
        for row in rows:
            cosine = ""
            if row["accuracy"]:
                rung = row["precision"].rpartition("/")[2]
                cosine = f"{row['accuracy'][rung]['cosine']:.5f}"
            cells.append(
                [
                    name,
                    row["graph"],
                    row["precision"],
                    f"{row['bytes'] / 1e6:,.1f} MB",
                    f"{row['bytes'] / exact_bytes[row['graph']]:.2f}x",
                    f"{row['seconds']:.1f} s",
                    f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
                    cosine,
                ]
            )
    return grid(head, cells)


# --- the run ---


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--digits", type=Path, help="a folder of speakers, each a data set")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of Llama-3.2-1B")
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args(argv)
    builder = find_builder(COMPUTE_CAPABILITY)
    command = COMMAND
    if args.digits:
        command += " --digits FOLDER"
    if args.layers != LAYERS:
        command += f" --layers {args.layers}"
    report = stamp(command)
    report["layers"] = args.layers
    report["builder"] = f"{builder.package} {builder.version}"

    data = {folder.name: load_dataset(folder) for folder in data_folders(args.digits)}
    recordings = tuple(sorted(shipped("voice").glob("train-*.flac"))[:N_CALIBRATION])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exact = with_exact_llm(folder / "bundle")
        (folder / "twins").mkdir()
        report["accuracy"] = accuracy(exact, data, folder / "twins")
        bundles = {"reference": (shipped("bundle"), exact.path)}
        if args.layers:
            exported = make_slice(args.work / str(args.layers), args.layers)
            name = f"wav2vec2-base, {args.layers} layers of Llama-3.2-1B"
            bundles[name] = (exported["int4"], exported[OWN])
        report["engines"] = {}
        for name, (bundle, exact_bundle) in tqdm(bundles.items(), desc="engines"):
            report["engines"][name] = engines(bundle, exact_bundle, recordings, folder / name)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
