"""`tiny-align build-engines`: the arguments and what is printed; build.py does the work."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import engines_path
from tiny_align.runtime.bundle.user_folders import find_users
from tiny_align.runtime.commands.options import (
    BundleOptions,
    UsersOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.machine import free_memory_line


@dataclass(frozen=True, kw_only=True)
class BuildOptions(UsersOptions, BundleOptions):
    compute_capability: int | None = field(
        default=None,
        metadata=option(
            "the GPU to build for, 86 for 8.6 (default: this machine's; TensorRT-RTX without a "
            "GPU: 86)",
            metavar="NN",
        ),
    )
    graph: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "build these graphs, even again (default: all without a matching engine)",
            metavar="NAME",
        ),
    )
    data: Path | None = field(
        default=None,
        metadata=option(
            "recordings of the user: they calibrate INT8 and measure every precision",
            metavar="DIR",
        ),
    )
    precision: str | None = field(
        default=None,
        metadata=option(
            "what graphs compute in: auto (the fastest within its error bound; default with "
            "--data), int8, fp16 or fp32 (as exported; default for graphs without an engine)",
            metavar="NAME",
        ),
    )
    user: str | None = field(
        default=None,
        metadata=option("build only an engine of this user's projector", metavar="NAME"),
    )
    force: bool = field(
        default=False,
        metadata=option(
            "build even if there seems to be too little memory, or TensorRT's rules forbid a graph"
        ),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads; the dispatcher adds `--json`."""
    add_options(parser, BuildOptions)


def run(args: argparse.Namespace) -> dict:
    """Build, and return {"engines": name -> entry of engine.json, "key", "path"}."""
    from tiny_align.engines.build import build_engines
    from tiny_align.engines.builder import find_builder
    from tiny_align.engines.ladder import Ladder

    options = read_options(args, BuildOptions)
    bundle = Bundle.open(options.bundle)
    if options.user is not None:
        users = find_users(bundle, options.user, options.users)
        bundle = bundle.for_user(bundle.user_folder(options.user, users))
    builder = find_builder(options.compute_capability)
    ladder = None
    if options.data or options.precision:
        ladder = Ladder.of(options.data, options.precision)
    if not args.json:
        print(
            f"{builder.package} {builder.version} "
            f"for compute capability {builder.compute_capability}"
        )
        print(free_memory_line(), flush=True)
    engines = build_engines(
        bundle,
        compute_capability=builder.compute_capability,
        graphs=list(options.graph) or None,
        ladder=ladder,
        force=options.force,
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
