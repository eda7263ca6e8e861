"""What it takes to give a running assistant another user's projector: refit, or a new engine.

    python -m benchmarks.studies.swap [--bundle DIR] [--repeats 5] [--out FILE] [--json]

The engine is built in any case: TensorRT-RTX needs no GPU for that. The swap is timed with every
backend that this machine runs. Without a GPU that is ONNX Runtime alone; the two ways of TensorRT
are then left out.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tiny_align.align.model.users import load_projector, write_user
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import link_tree
from tiny_align.runtime.machine import gpu_compute_capability

RESULTS = Path(__file__).parents[1] / "results" / "swap.json"
BUILT = "an engine of their own"  # a way to swap with TensorRT
REFITTED = "refit"  # the other


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Median seconds of building a user's engine, "build_s", and of each way to swap, "swap_s"."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = copy_bundle(path, Path(folder) / "bundle")
        with_engine = add_user(bundle, "built")
        without_engine = add_user(bundle, "refitted")
        user = bundle.for_user(with_engine.parent)
        build_s = []
        for _ in range(repeats):
            entry = build_engines(user, graphs=["projector"])["projector"]
            build_s.append(entry["seconds"])
        swap_s = swap_seconds(bundle, "onnxruntime", {"onnxruntime": with_engine}, repeats)
        if gpu_compute_capability() is not None:
            build_engines(bundle)
            graphs = {BUILT: with_engine, REFITTED: without_engine}
            swap_s |= swap_seconds(bundle, "tensorrt", graphs, repeats)
    return {"build_s": statistics.median(build_s), "swap_s": swap_s}


def copy_bundle(path: Path, copy: Path) -> Bundle:
    """Links to a bundle's files, without its users and engines."""
    link_tree(path, copy)
    for name in ("engines", "users"):
        shutil.rmtree(copy / name, ignore_errors=True)
    return Bundle.open(copy)


def add_user(bundle: Bundle, name: str) -> Path:
    """A user with weights unlike the general projector's; their graph."""
    weights = load_projector(bundle, bundle.graph("projector")).state_dict()
    for parameter, value in weights.items():
        weights[parameter] = value + 1e-3 * torch.randn_like(value)
    write_user(bundle, bundle.path / "users" / name, weights, {}, bundle.speech_tokens())
    return bundle.projector(name)


def swap_seconds(
    bundle: Bundle, backend: str, graphs: dict[str, Path], repeats: int
) -> dict[str, float]:
    """Median seconds of `swap_projector` from the general projector to each graph, in turns.

    Args:
        graphs: way -> the graph of a user's projector.
    """
    seconds: dict[str, list[float]] = {way: [] for way in graphs}
    with Assistant.load(bundle, backend=backend) as assistant:
        for _ in range(repeats):
            for way, graph in graphs.items():
                began = time.perf_counter()
                assistant.swap_projector(graph)
                seconds[way].append(time.perf_counter() - began)
                assistant.swap_projector(bundle.projector())
    return {way: statistics.median(values) for way, values in seconds.items()}


def table(report: dict[str, Any]) -> str:
    """The report as a table."""
    built = f"{BUILT} is built ({report['builder']})"
    rows = [[built, f"{1000 * report['build_s']:.0f} ms"]]
    for way, seconds in report["swap_s"].items():
        rows.append([f"swap, {way}", f"{1000 * seconds:.1f} ms"])
    return grid(["a user's projector", ""], rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    builder = find_builder()
    report = stamp("python -m benchmarks.studies.swap")
    report["builder"] = f"{builder.package} {builder.version}"
    report["compute_capability"] = builder.compute_capability
    report |= measure(args.bundle, args.repeats)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
