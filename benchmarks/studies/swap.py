"""What it takes to give a running assistant another person's projector: by refit, or by an engine of their own.

    python -m benchmarks.studies.swap [--bundle DIR] [--repeats 5] [--out FILE] [--json]

The engine is built in any case: TensorRT-RTX needs no GPU for that. The exchange is timed with every backend that this
machine runs: where no GPU runs the engines that is ONNX Runtime alone, and the two others are left out.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tiny_align.align.model.users import load_projector, write_user
from tiny_align.benchmarks import finish
from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import link_tree
from tiny_align.runtime.machine import describe, gpu_compute_capability

RESULTS = Path(__file__).parents[1] / "results" / "swap.json"
BUILT, REFITTED = "an engine of their own", "refit"


def measure(path: Path, repeats: int) -> dict[str, dict]:
    """Median seconds of building a person's engine, "build_s", and of each way to put it in, "swap_s"."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = _copy(path, Path(folder) / "bundle")
        people = {
            way: add_user(bundle, name) for way, name in ((BUILT, "built"), (REFITTED, "refitted"))
        }
        person = bundle.for_user(people[BUILT].parent)
        built = [
            build_engines(person, graphs=["projector"])["projector"]["seconds"]
            for _ in range(repeats)
        ]
        swaps = swap_seconds(bundle, "onnxruntime", {"onnxruntime": people[BUILT]}, repeats)
        if gpu_compute_capability() is not None:
            build_engines(bundle)
            swaps |= swap_seconds(bundle, "tensorrt", people, repeats)
    return {"build_s": statistics.median(built), "swap_s": swaps}


def _copy(path: Path, copy: Path) -> Bundle:
    link_tree(path, copy)
    for kept in ("engines", "users"):
        shutil.rmtree(copy / kept, ignore_errors=True)
    return Bundle.open(copy)


def add_user(bundle: Bundle, name: str) -> Path:
    """A person with weights unlike the general projector's; their graph."""
    weights = load_projector(bundle, bundle.graph("projector")).state_dict()
    changed = {
        parameter: value + 1e-3 * torch.randn_like(value) for parameter, value in weights.items()
    }
    write_user(bundle, bundle.path / "users" / name, changed, {}, bundle.speech_tokens())
    return bundle.projector(name)


def swap_seconds(
    bundle: Bundle, backend: str, people: dict[str, Path], repeats: int
) -> dict[str, float]:
    """Median seconds of `swap_projector` to each person from the general projector, in turns."""
    seconds = {way: [] for way in people}
    with Assistant.load(bundle, backend=backend) as assistant:
        for _ in range(repeats):
            for way, graph in people.items():
                began = time.perf_counter()
                assistant.swap_projector(graph)
                seconds[way].append(time.perf_counter() - began)
                assistant.swap_projector(bundle.projector())
    return {way: statistics.median(values) for way, values in seconds.items()}


def table(report: dict) -> str:
    swaps = [
        f"| put in, {way} | {1000 * seconds:.1f} ms |" for way, seconds in report["swap_s"].items()
    ]
    built = f"| {BUILT} is built ({report['builder']}) | {1000 * report['build_s']:.0f} ms |"
    return "\n".join(["| a person's projector | |", "|---|---|", built, *swaps])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--json", action="store_true", help="print nothing but the JSON document on stdout"
    )
    args = parser.parse_args(argv)
    builder = find_builder()
    report = {
        "command": "python -m benchmarks.studies.swap",
        "date": date.today().isoformat(),
        "machine": describe(),
        "builder": f"{builder.package} {builder.version}",
        "compute_capability": builder.compute_capability,
        **measure(args.bundle, args.repeats),
    }
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
