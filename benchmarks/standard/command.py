"""`tiny-align bench`: how fast, how small and how good, beside what would be used instead and beside the limit.

    tiny-align bench all [--short] [--out DIR]    # every part; writes DIR/MACHINE.json, .md and pictures
    tiny-align bench inference memory             # some of them
    tiny-align bench diff A.json B.json           # exit status 1 on a regression beyond noise

The parts are standard.py's. What takes hours (families, fewer bits, full sizes) are programs of their own in this
folder: `make bench-full`.
"""

import os
import re
import sys
import time
from datetime import datetime
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import write_errors

NAMES = ("inference", "streaming", "memory", "compare", "limits", "growth", "quality", "training")
ALL, DIFF = "all", "diff"


def add_arguments(parser) -> None:
    parser.add_argument(
        "parts",
        nargs="+",
        metavar="PART",
        help=f"{', '.join(NAMES)}, {ALL}; or {DIFF} A.json B.json",
    )
    parser.add_argument("--bundle", type=Path, help="another bundle than the shipped one")
    parser.add_argument("--data", type=Path, help="other recordings than the shipped ones")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--short", action="store_true", help="a few minutes: to see that everything works"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-align-bench"), help="folder for what is written"
    )
    parser.add_argument(
        "--slow",
        action="append",
        default=[],
        metavar="STAGE=1.2",
        help="slow a stage down, to see `diff` report it",
    )


def run(args) -> dict:
    """The result, or the differences of two; `exit_status` 1 with a regression.

    Raises:
        TinyAlignError: an unknown part, or results that cannot be compared.
    """
    if args.parts[0] == DIFF:
        return _diff(args)
    names = list(NAMES) if ALL in args.parts else list(dict.fromkeys(args.parts))
    if unknown := [name for name in names if name not in NAMES]:
        raise TinyAlignError(
            f"there is no part {unknown[0]!r}: choose of {', '.join(NAMES)}, {ALL} and {DIFF}"
        )
    return _measure(args, names)


def _diff(args) -> dict:
    from tiny_align.benchmarks.standard import diff, results

    if len(args.parts) != 3:
        raise TinyAlignError(f"{DIFF} takes two results: tiny-align bench {DIFF} A.json B.json")
    found = diff.compare(*(results.read(Path(path)) for path in args.parts[1:]))
    if not args.json:
        print(diff.table(found))
    return found | {"exit_status": int(bool(found["regressions"]))}


def _measure(args, names: list[str]) -> dict:
    from tqdm import tqdm

    from tiny_align.benchmarks.standard import parts as standard
    from tiny_align.benchmarks.standard import results, tables
    from tiny_align.benchmarks.standard.harness import state

    setting = _setting(args)
    with write_errors(args.out):  # before anything long
        args.out.mkdir(parents=True, exist_ok=True)
    result = _stamp(args, names, setting)
    began, parts = time.perf_counter(), {}
    for name in (bar := tqdm(names, desc="bench", file=sys.stderr)):
        bar.set_postfix_str(name)
        parts[name] = standard.measure(name, setting)
    result |= {"seconds": time.perf_counter() - began, "after": state(), "parts": parts}
    path = args.out / f"{results.machine_name(result['machine'])}.json"
    with write_errors(args.out):
        results.write(path, result)
        tables.write(path, result)
    if not args.json:
        print(tables.markdown(result))
    return result | {"path": str(path)}


def _setting(args):
    from tiny_align.align.commands.demo import shipped
    from tiny_align.benchmarks.standard.parts import Setting

    paths = (str(args.bundle or shipped("bundle")), str(args.data or shipped("voice")))
    return Setting(*paths, args.threads, args.short, tuple(_slowed(text) for text in args.slow))


def _slowed(text: str) -> tuple[str, float]:
    from tiny_align.benchmarks.standard.stages import STAGES

    name, _, factor = text.partition("=")
    if name not in STAGES or not re.fullmatch(r"[1-9]\d*(\.\d+)?", factor):
        raise TinyAlignError(
            f"--slow {text} is no STAGE=FACTOR: give one of {', '.join(STAGES)}, and =1.2"
        )
    return name, float(factor)


def _stamp(args, names: list[str], setting) -> dict:
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
