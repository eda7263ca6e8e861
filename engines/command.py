"""`tiny-align build-engines`: the arguments and what is printed; build.py does the work."""

import argparse
from pathlib import Path

from tiny_align.engines.build import build_engines
from tiny_align.engines.builder import find_builder
from tiny_align.engines.ladder import Ladder
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import engines_path
from tiny_align.runtime.machine import free_memory_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads; the dispatcher adds `--json`."""
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="the bundle to build engines for"
    )
    parser.add_argument(
        "--compute-capability",
        type=int,
        metavar="NN",
        help="the GPU to build for, 86 for 8.6 (default: this machine's; TensorRT-RTX without a "
        "GPU: 86)",
    )
    parser.add_argument(
        "--graph",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="build these graphs, even again (default: all without a matching engine)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="recordings of the user: they calibrate INT8 and measure every precision",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="what graphs compute in: auto (the fastest within its error bound; default with "
        "--data), int8, fp16 or fp32 (as exported; default for graphs without an engine)",
    )
    parser.add_argument(
        "--user", metavar="NAME", help="build only an engine of this user's projector"
    )
    parser.add_argument(
        "--users",
        type=Path,
        metavar="DIR",
        help="directory of user profiles (default: BUNDLE/users)",
    )
    parser.add_argument(
        "--force", action="store_true", help="build even if there seems to be too little memory"
    )


def run(args: argparse.Namespace) -> dict:
    """Build, and return {"engines": name -> entry of engine.json, "key", "path"}."""
    bundle = Bundle.open(args.bundle)
    if args.user is not None:
        bundle = bundle.for_user(bundle.user_folder(args.user, args.users))
    builder = find_builder(args.compute_capability)
    ladder = Ladder.of(args.data, args.precision) if args.data or args.precision else None
    if not args.json:
        print(
            f"{builder.package} {builder.version} "
            f"for compute capability {builder.compute_capability}"
        )
        print(free_memory_line(), flush=True)
    engines = build_engines(
        bundle,
        compute_capability=builder.compute_capability,
        graphs=args.graph,
        ladder=ladder,
        force=args.force,
    )
    path = engines_path(bundle, builder.facts)
    if not args.json:
        _print_engines(engines, path)
    return {"engines": engines, "key": builder.key, "path": str(path)}


def _print_engines(engines: dict[str, dict], path: Path) -> None:
    for name, entry in engines.items():
        line = (
            f"{name}: {entry['precision']}, {entry['bytes'] / 1e6:.1f} MB, "
            f"built in {entry['seconds']:.1f} s with {entry['peak_memory_bytes'] / 1e6:.0f} MB"
        )
        rungs = []
        for precision, found in (entry["accuracy"] or {}).items():
            rungs.append(f"{precision} {found['cosine']:.5f} of {found['bound']:g}")
        if rungs:
            line += f"; cosine {', '.join(rungs)}"
        print(line)
    print(f"engines in {path}")
