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
    """Add what `run` reads; `--json` is the dispatcher's."""
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="the bundle to build engines for"
    )
    parser.add_argument(
        "--compute-capability",
        type=int,
        metavar="NN",
        help="the GPU to build for, 86 for 8.6 (default: this machine's; without a GPU TensorRT-RTX takes 86)",
    )
    parser.add_argument(
        "--graph",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="build these graphs, even again (default: all that lack an engine that fits)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="recordings of the person who will be heard: INT8 is calibrated and every precision measured on them",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="what graphs compute in: auto (the fastest within its bound; default with --data), int8, fp16 or fp32 "
        "(as exported; default for what has no engine yet)",
    )
    parser.add_argument(
        "--user", metavar="NAME", help="build an engine of this person's projector only"
    )
    parser.add_argument(
        "--users", type=Path, metavar="DIR", help="where persons are kept (default: BUNDLE/users)"
    )
    parser.add_argument(
        "--force", action="store_true", help="build even where memory seems not to do"
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
            f"{builder.package} {builder.version} for compute capability {builder.compute_capability}"
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
    for name, engine in engines.items():
        print(
            f"{name}: {engine['precision']}, {engine['bytes'] / 1e6:.1f} MB, built in {engine['seconds']:.1f} s "
            f"with {engine['peak_memory_bytes'] / 1e6:.0f} MB{_tried(engine['accuracy'])}"
        )
    print(f"engines in {path}")


def _tried(accuracy: dict | None) -> str:
    """What the ladder found."""
    rungs = (
        f"{name} {found['cosine']:.5f} of {found['bound']:g}"
        for name, found in (accuracy or {}).items()
    )
    return f"; cosine {', '.join(rungs)}" if accuracy else ""
