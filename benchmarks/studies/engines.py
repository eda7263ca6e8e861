"""What building engines takes: seconds and memory of each graph's process, and what a timing cache saves.

    python -m benchmarks.studies.engines [--full-size DIR] [--repeats 5] [--json]

Takes the builder that is installed: TensorRT-RTX needs no GPU. Builds every graph of the shipped bundle and of the
one that benchmarks.full_size makes, from copies. Writes benchmarks/results/engines.json;
the last line of stdout is the same document.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from datetime import date
from pathlib import Path

from tiny_align.engines.build import build_engines, graph_source, make_job
from tiny_align.engines.builder import Builder, find_builder
from tiny_align.engines.preflight import build_need_bytes
from tiny_align.engines.process import run_build
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import link_tree, write_json
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "engines.json"
COMMAND = "python -m benchmarks.studies.engines --full-size work/full_size/bundle"


def costs(path: Path) -> dict[str, dict]:
    """Builds every graph of a bundle, in a copy of it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        link_tree(path, copy)
        shutil.rmtree(copy / "engines", ignore_errors=True)
        bundle = Bundle.open(copy)
        return {
            name: _row(bundle, entry) for name, entry in build_engines(bundle, force=True).items()
        }


def _row(bundle: Bundle, entry: dict) -> dict:
    graph_bytes = sum((bundle.path / file).stat().st_size for file in entry["files"])
    kept = ("precision", "bytes", "seconds", "peak_memory_bytes")
    return {"graph_bytes": graph_bytes, **{k: entry[k] for k in kept}}


def timing_cache(bundle: Bundle, builder: Builder, repeats: int) -> dict[str, float]:
    """Median seconds of building the LLM's engine with nothing timed yet and with the cache of an earlier build."""
    seconds = {"empty": [], "filled": []}
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


def table(report: dict) -> str:
    lines = [
        "| bundle | graph | precision | graph | engine | build | most memory | of the graph | estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for bundle, graphs in report["bundles"].items():
        for name, row in graphs.items():
            need = build_need_bytes(row["graph_bytes"])
            ratio = row["peak_memory_bytes"] / row["graph_bytes"]
            cells = (_megabytes(row[k]) for k in ("graph_bytes", "bytes"))
            lines.append(
                f"| {bundle} | {name} | {row['precision']} | {' | '.join(cells)} | {row['seconds']:.1f} s | "
                f"{_megabytes(row['peak_memory_bytes'])} | {ratio:.2f}x | {_megabytes(need)} |"
            )
    cache = report["timing_cache_s"]
    told = (
        f"{report['builder']} for compute capability {report['compute_capability']}. The shipped LLM's build with an "
        f"empty timing cache took {cache['empty']:.2f} s, with a filled one {cache['filled']:.2f} s."
    )
    return "\n".join([*lines, "", told])


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full-size",
        type=Path,
        metavar="DIR",
        help="the bundle of benchmarks.full_size (default: none)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="of the build with and without a timing cache"
    )
    parser.add_argument(
        "--json", action="store_true", help="print nothing but the JSON document on stdout"
    )
    args = parser.parse_args(argv)
    builder, own = find_builder(), Bundle.open(shipped("bundle"))
    bundles = {"reference": own.path} | ({"full size": args.full_size} if args.full_size else {})
    report = {
        "command": COMMAND,
        "date": date.today().isoformat(),
        "machine": describe(),
        "builder": f"{builder.package} {builder.version}",
        "compute_capability": builder.compute_capability,
        "bundles": {name: costs(path) for name, path in bundles.items()},
        "timing_cache_s": timing_cache(own, builder, args.repeats),
    }
    write_json(RESULTS, report)
    if not args.json:
        print(table(report))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
