"""What building engines takes, in seconds and memory, and what a timing cache saves.

    python -m benchmarks.studies.engines [--full-size DIR] [--repeats 5] [--json]

Measures each graph's build process. Uses the builder that is installed: TensorRT-RTX needs no GPU.
Builds every graph of the shipped bundle and of the one that benchmarks.studies.full_size makes, in
copies. Writes benchmarks/results/engines.json; the last line of stdout is the same document.
"""

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.engines.build import build_engines, graph_source, make_job
from tiny_align.engines.builder import Builder, find_builder
from tiny_align.engines.preflight import build_need_bytes
from tiny_align.engines.process import run_build
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import link_tree

RESULTS = Path(__file__).parents[1] / "results" / "engines.json"
COMMAND = "python -m benchmarks.studies.engines --full-size work/full_size/bundle"


COLUMNS = ("precision", "bytes", "seconds", "peak_memory_bytes")  # of the builder's report


def costs(path: Path) -> dict[str, dict]:
    """Build every graph of a bundle, in a copy of it."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        link_tree(path, copy)
        shutil.rmtree(copy / "engines", ignore_errors=True)
        bundle = Bundle.open(copy)
        for name, entry in build_engines(bundle, force=True).items():
            graph_bytes = sum((copy / file).stat().st_size for file in entry["files"])
            rows[name] = {"graph_bytes": graph_bytes}
            for column in COLUMNS:
                rows[name][column] = entry[column]
    return rows


def timing_cache(bundle: Bundle, builder: Builder, repeats: int) -> dict[str, float]:
    """Median seconds of building the LLM's engine, by whether the timing cache is filled."""
    seconds: dict[str, list[float]] = {"empty": [], "filled": []}
    profile = graph_source(bundle, "llm")["profile"]
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(bundle.graph("llm"), "llm", builder, Path(folder), profile)
        cache = Path(folder) / "cache"
        for _ in range(repeats):  # the first leaves the cache that the second finds
            cache.unlink(missing_ok=True)
            for state in seconds:
                built = run_build("llm", {**job, "timing_cache": str(cache)}, lambda *_: None)
                seconds[state].append(built["seconds"])
    return {state: statistics.median(values) for state, values in seconds.items()}


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    head = [
        "bundle",
        "graph",
        "precision",
        "graph",
        "engine",
        "build",
        "peak memory",
        "of the graph",
        "estimate",
    ]
    rows = []
    for bundle, graphs in report["bundles"].items():
        for name, row in graphs.items():
            rows.append(
                [
                    bundle,
                    name,
                    row["precision"],
                    megabytes(row["graph_bytes"]),
                    megabytes(row["bytes"]),
                    f"{row['seconds']:.1f} s",
                    megabytes(row["peak_memory_bytes"]),
                    f"{row['peak_memory_bytes'] / row['graph_bytes']:.2f}x",
                    megabytes(build_need_bytes(row["graph_bytes"])),
                ]
            )
    cache = report["timing_cache_s"]
    return (
        f"{grid(head, rows)}\n\n"
        f"{report['builder']} for compute capability {report['compute_capability']}. "
        f"The shipped LLM's build with an empty timing cache took {cache['empty']:.2f} s, "
        f"with a filled one {cache['filled']:.2f} s."
    )


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument(
        "--full-size",
        type=Path,
        metavar="DIR",
        help="the bundle of benchmarks.studies.full_size (default: none)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="of the build with and without a timing cache"
    )
    args = parser.parse_args(argv)
    builder = find_builder()
    reference = Bundle.open(shipped("bundle"))
    report = stamp(COMMAND)
    report["builder"] = f"{builder.package} {builder.version}"
    report["compute_capability"] = builder.compute_capability
    report["bundles"] = {"reference": costs(reference.path)}
    if args.full_size:
        report["bundles"]["full size"] = costs(args.full_size)
    report["timing_cache_s"] = timing_cache(reference, builder, args.repeats)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
