"""How well each objective and projector aligns speech with the LLM, at the same wall-clock budget.

    python -m benchmarks.studies.alignment [--digits FOLDER] [--parts table]
        [--objectives ctc paper] [--processes 2] [--json]

The study has two parts, each with medians over the seeds.

`table` (alignment_table.py): {projector} x {objective}. Each cell is trained from nothing on voices
the encoder knows, then for each new voice on 100 of its utterances; both learning rates are tuned
per cell. Beside them stand the typed ceiling, the transcript cascade and the chance level.

`curves` (alignment_curves.py): the shipped bundle personalised, from few utterances to many, in
noise, and what it forgets.

Finished jobs are stored (WORK/PART.json): a long run may be interrupted, and a report shows all of
it. Needs espeak-ng and flite. Writes benchmarks/results/alignment-PART.json and its pictures; the
last line of stdout holds both documents.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from tiny_align.align.model.objectives import FRAMED, POOLED
from tiny_align.align.model.projector import PROJECTORS
from tiny_align.benchmarks import new_parser, stamp
from tiny_align.benchmarks.standard.speakers import speakers_of
from tiny_align.benchmarks.studies.alignment_curves import CurvesJob, curves
from tiny_align.benchmarks.studies.alignment_data import (
    FEW,
    VOICES,
    Setting,
    measure_cascade,
    prepare,
)
from tiny_align.benchmarks.studies.alignment_plots import plot_curves, plot_table
from tiny_align.benchmarks.studies.alignment_table import REPORTED, TableJob, summary, table
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
COMMAND = "python -m benchmarks.studies.alignment"
PARTS = {  # name -> its table and its pictures
    "table": (table, plot_table),
    "curves": (curves, plot_curves),
}


class Job(Protocol):
    """What is measured in a process of its own."""

    def run(self) -> dict[str, Any]: ...


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    reports = {}
    for part in args.parts:
        show, plot = PARTS[part]
        report = measure(args, part)
        report["plots"] = plot(report, args.out)
        write_json(args.out / f"alignment-{part}.json", report)
        print(show(report), file=sys.stderr if args.json else sys.stdout)
        reports[part] = report
    print(json.dumps(reports))
    return 0


def measure(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """A part's report."""
    setting = Setting(
        bundle=str(args.bundle),
        work=str(args.work),
        budget_s=args.budget,
        personal_s=args.personal,
        known=args.known,
        seeds=args.seeds,
        few=list(args.few),
    )
    prepare(setting, args.objectives if part == "table" else [])
    report = stamp(command_of(args, part))
    folders = {voice: args.work / voice for voice in VOICES} | speakers_of(args.digits)
    report["cascade"] = {}
    with Assistant.load(args.bundle) as assistant:
        for name, folder in {"known": args.work / "known", **folders}.items():
            report["cascade"][name] = measure_cascade(assistant, folder)
        report["encoder_key"] = assistant.bundle.manifest.encoder_key
    report["setting"] = setting.to_json()

    jobs: dict[str, Job] = {}
    if part == "table":
        cells = list(itertools.product(args.objectives, args.projectors))
        cells.sort(key=lambda cell: cell[1] != REPORTED)  # an interrupted run has this one first
        for objective, kind in cells:
            jobs[f"{objective}/{kind}"] = TableJob(setting, kind, objective)
    else:
        for name, folder in folders.items():
            jobs[name] = CurvesJob(setting, name, str(folder))
    report["results"] = run_all(jobs, args.work / f"{part}.json", setting, args.processes)
    if part == "table":
        report["summary"] = summary(report["results"])
    return report


def run_all(
    jobs: dict[str, Job], stored: Path, setting: Setting, processes: int
) -> dict[str, dict]:
    """Run every job in a process of its own.

    Args:
        stored: results by job; those of this setting are not measured again, and returned too.
    """
    key = setting.to_json() | {"bundle": Bundle.open(setting.bundle).manifest.files}
    results = {}
    if stored.exists():
        state = json.loads(stored.read_text(encoding="utf-8"))
        if state["setting"] == key:
            results = state["results"]
    missing = {name: job for name, job in jobs.items() if name not in results}
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="alignment")
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for name, result in pool.imap_unordered(_run, missing.items()):
            results[name] = result
            write_json(stored, {"setting": key, "results": results})
            bar.update()
    return results


def _run(named_job: tuple[str, Job]) -> tuple[str, dict[str, Any]]:
    name, job = named_job
    return name, job.run()


def command_of(args: argparse.Namespace, part: str) -> str:
    """The command that measures a part so: options that differ from the default, no folders."""
    words = [COMMAND, "--parts", part]
    if args.digits:
        words.append("--digits FOLDER")
    defaults = make_parser()
    for name in ("objectives", "projectors", "seeds", "few", "budget", "personal", "known"):
        value = _values(getattr(args, name))
        if value != _values(defaults.get_default(name)):
            words += [f"--{name}", *map(str, value)]
    return " ".join(words)


def _values(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("work/alignment"),
        help="recordings, features, results of finished jobs",
    )
    parser.add_argument(
        "--digits", type=Path, help="a folder of speakers, each with metadata.jsonl"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--objectives", nargs="+", choices=FRAMED + POOLED, default=FRAMED + POOLED)
    parser.add_argument("--projectors", nargs="+", choices=PROJECTORS, default=tuple(PROJECTORS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--few", type=int, nargs="+", default=FEW, help="utterances to personalise on"
    )
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds of training from nothing, one core"
    )
    parser.add_argument(
        "--personal", type=float, default=15.0, help="seconds of training for a voice, one core"
    )
    parser.add_argument(
        "--known", type=int, default=2000, help="utterances by known voices to train on"
    )
    parser.add_argument("--processes", type=int, default=1, help="jobs at once, a core each")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
