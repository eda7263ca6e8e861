"""`tiny-align bench`: how fast, how small and how good, beside what would be used instead and beside the limit.

    tiny-align bench all [--short] [--out DIR]    # every part; writes DIR/MACHINE.json, .md and pictures
    tiny-align bench inference memory             # some of them
    tiny-align bench diff A.json B.json           # exit status 1 on a regression beyond noise

The parts are standard.py's. What takes hours (families, fewer bits, full sizes) are programs of their own in this
folder: `make bench-full`.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

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
ALL, DIFF = "all", "diff"


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


def run(args: argparse.Namespace) -> dict:
    """The result, or the differences of two; `exit_status` 1 with a regression.

    Raises:
        TinyAlignError: an unknown part, or results that cannot be compared.
    """
    options = read_options(args, BenchOptions)
    if options.parts[0] == DIFF:
        return _diff(options, quiet=args.json)
    names = list(NAMES) if ALL in options.parts else list(dict.fromkeys(options.parts))
    if unknown := [name for name in names if name not in NAMES]:
        raise TinyAlignError(
            f"there is no part {unknown[0]!r}: choose of {', '.join(NAMES)}, {ALL} and {DIFF}"
        )
    return _measure(options, names, quiet=args.json)


def _diff(options: BenchOptions, quiet: bool) -> dict:
    from tiny_align.benchmarks.standard import diff, results

    if len(options.parts) != 3:
        raise TinyAlignError(f"{DIFF} takes two results: tiny-align bench {DIFF} A.json B.json")
    found = diff.compare(*(results.read(Path(path)) for path in options.parts[1:]))
    if not quiet:
        print(diff.table(found))
    return found | {"exit_status": int(bool(found["regressions"]))}


def _measure(options: BenchOptions, names: list[str], quiet: bool) -> dict:
    from tqdm import tqdm

    from tiny_align.benchmarks.standard import parts as standard
    from tiny_align.benchmarks.standard import results, tables
    from tiny_align.benchmarks.standard.harness import state

    setting = _setting(options)
    with write_errors(options.out):  # before anything long
        options.out.mkdir(parents=True, exist_ok=True)
    result = _stamp(names, setting)
    began, parts = time.perf_counter(), {}
    for name in (bar := tqdm(names, desc="bench", file=sys.stderr)):
        bar.set_postfix_str(name)
        parts[name] = standard.measure(name, setting)
    result |= {"seconds": time.perf_counter() - began, "after": state(), "parts": parts}
    path = options.out / f"{results.machine_name(result['machine'])}.json"
    with write_errors(options.out):
        results.write(path, result)
        tables.write(path, result)
    if not quiet:
        print(tables.markdown(result))
    return result | {"path": str(path)}


def _setting(options: BenchOptions) -> "Setting":
    from tiny_align.benchmarks.standard.parts import Setting

    return Setting(
        bundle=str(options.bundle),
        data=str(options.data),
        threads=options.threads or os.cpu_count() or 1,
        short=options.short,
        slow=tuple(_slowed(text) for text in options.slow),
    )


def _slowed(text: str) -> tuple[str, float]:
    from tiny_align.benchmarks.standard.stages import STAGES

    name, _, factor = text.partition("=")
    if name not in STAGES or not re.fullmatch(r"[1-9]\d*(\.\d+)?", factor):
        raise TinyAlignError(
            f"--slow {text} is no STAGE=FACTOR: give one of {', '.join(STAGES)}, and =1.2"
        )
    return name, float(factor)


def _stamp(names: list[str], setting: "Setting") -> dict:
    """Where, when and what: everything but what is measured, without paths of this machine."""
    from tiny_align.benchmarks.standard import harness, results
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.manifest import MANIFEST
    from tiny_align.runtime.files import sha256
    from tiny_align.runtime.machine import describe

    bundle = Bundle.open(setting.bundle)
    whole = " ".join([ALL] if tuple(names) == NAMES else names)
    return {
        "schema": results.SCHEMA,
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": f"tiny-align bench {whole}" + " --short" * setting.short,
        "machine": describe(),
        "versions": harness.versions(),
        "setting": {
            "threads": setting.threads,
            "short": setting.short,
            "bundle": bundle.manifest.name,
            "bundle_sha256": sha256(bundle.path / MANIFEST),
            "data": Path(setting.data).name,
            "slow": dict(setting.slow),
        },
        "before": harness.state(),
    }
