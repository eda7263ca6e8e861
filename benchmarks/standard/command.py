"""`tiny-align bench`: how fast, how small and how good, beside its peers and beside the limit.

    tiny-align bench all [--short] [--out DIR]    # every part; DIR/MACHINE.json, .md, pictures
    tiny-align bench inference memory             # some of them
    tiny-align bench diff A.json B.json           # exit status 1 on a regression beyond noise

The parts are those of parts.py. What takes hours (families, fewer bits, full sizes) are programs of
their own in benchmarks/studies: `make bench-full`.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_align.runtime.commands.options import (
    ShippedBundleOptions,
    ShippedDataOptions,
    ThreadOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import write_errors

if TYPE_CHECKING:
    from tiny_align.benchmarks.standard.parts import Setting

NAMES = ("inference", "streaming", "memory", "compare", "limits", "growth", "quality", "training")
ALL = "all"
DIFF = "diff"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ThreadOptions, ShippedDataOptions, ShippedBundleOptions):
    parts: tuple[str, ...] = field(
        metadata=option(
            f"{', '.join(NAMES)}, {ALL}; or {DIFF} A.json B.json", metavar="PART", positional=True
        )
    )
    short: bool = field(
        default=False, metadata=option("a few minutes, to see that everything works")
    )
    out: Path = field(
        default=Path("tiny-align-bench"), metadata=option("folder for the results", metavar="DIR")
    )
    slow: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "slow a stage down, to see that `diff` reports it", metavar="STAGE=1.2", repeat=True
        ),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, BenchOptions)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The result, or the differences of two; `exit_status` 1 with a regression.

    Raises:
        TinyAlignError: an unknown part, or results that cannot be compared.
    """
    options = read_options(args, BenchOptions)
    if options.parts[0] == DIFF:
        return compare_files(options, quiet=args.json)
    names = list(NAMES) if ALL in options.parts else list(dict.fromkeys(options.parts))
    for name in names:
        if name not in NAMES:
            raise TinyAlignError(
                f"expected a part of {', '.join(NAMES)}, {ALL} and {DIFF}, got {name!r}"
            )
    return measure(options, names, quiet=args.json)


def compare_files(options: BenchOptions, quiet: bool) -> dict[str, Any]:
    """`tiny-align bench diff`."""
    from tiny_align.benchmarks.standard import diff, results

    if len(options.parts) != 3:
        raise TinyAlignError(f"{DIFF} takes two results: tiny-align bench {DIFF} A.json B.json")
    _, path_a, path_b = options.parts
    found = diff.compare(results.read(Path(path_a)), results.read(Path(path_b)))
    if not quiet:
        print(diff.table(found))
    return found | {"exit_status": int(bool(found["regressions"]))}


def measure(options: BenchOptions, names: list[str], quiet: bool) -> dict[str, Any]:
    """Measure the named parts and write the result, its report and its pictures."""
    from tqdm import tqdm

    from tiny_align.benchmarks.standard import parts as standard
    from tiny_align.benchmarks.standard import results, tables
    from tiny_align.benchmarks.standard.harness import machine_state

    setting = make_setting(options)
    with write_errors(options.out):  # before anything long
        options.out.mkdir(parents=True, exist_ok=True)
    result = stamp(names, setting)
    began = time.perf_counter()
    parts = {}
    bar = tqdm(names, desc="bench", file=sys.stderr)
    for name in bar:
        bar.set_postfix_str(name)
        parts[name] = standard.measure(name, setting)
    result["seconds"] = time.perf_counter() - began
    result["after"] = machine_state()
    result["parts"] = parts

    path = options.out / f"{results.machine_name(result['machine'])}.json"
    with write_errors(options.out):
        results.write(path, result)
        tables.write(path, result)
    if not quiet:
        print(tables.markdown(result))
    return result | {"path": str(path)}


def make_setting(options: BenchOptions) -> "Setting":
    from tiny_align.benchmarks.standard.parts import Setting

    return Setting(
        bundle=str(options.bundle),
        data=str(options.data),
        threads=options.threads or os.cpu_count() or 1,
        short=options.short,
        slow=tuple(parse_slow(text) for text in options.slow),
    )


def parse_slow(text: str) -> tuple[str, float]:
    """An argument of `--slow` as stage and factor."""
    from tiny_align.benchmarks.standard.stages import STAGES

    stage, _, factor = text.partition("=")
    if stage not in STAGES or not re.fullmatch(r"[1-9]\d*(\.\d+)?", factor):
        raise TinyAlignError(
            f"--slow {text} is no STAGE=FACTOR: give one of {', '.join(STAGES)}, and =1.2"
        )
    return stage, float(factor)


def stamp(names: list[str], setting: "Setting") -> dict[str, Any]:
    """Where, when and what: everything but what is measured, without paths of this machine."""
    from tiny_align.benchmarks.standard import harness, results
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.manifest import MANIFEST
    from tiny_align.runtime.files import sha256
    from tiny_align.runtime.machine import describe

    bundle = Bundle.open(setting.bundle)
    chosen = ALL if tuple(names) == NAMES else " ".join(names)
    short = " --short" if setting.short else ""
    return {
        "schema": results.SCHEMA,
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": f"tiny-align bench {chosen}{short}",
        "machine": describe(),
        "versions": harness.package_versions(),
        "setting": {
            "threads": setting.threads,
            "short": setting.short,
            "bundle": bundle.manifest.name,
            "bundle_sha256": sha256(bundle.path / MANIFEST),
            "data": Path(setting.data).name,
            "slow": dict(setting.slow),
        },
        "before": harness.machine_state(),
    }
