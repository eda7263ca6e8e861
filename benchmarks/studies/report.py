"""Writes the measured tables of the README and of docs/measured.md from benchmarks/results/: no number there is typed.

python -m benchmarks.studies.report            # rewrite both
python -m benchmarks.studies.report --check    # exit 1 if one is not up to date

Only what lies between a table's markers is replaced. The standard run's tables are those of its newest result; what was
not measured stays blank.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from tiny_align.benchmarks.standard import streaming, tables, training_cost
from tiny_align.benchmarks.studies import (
    alignment,
    encoder,
    engines,
    families,
    full_size,
    llm,
    precision,
    quality,
    quantisation,
)
from tiny_align.runtime.files import write_text

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "measured.md")
RESULTS = ROOT / "benchmarks" / "results"
PROGRAMS = {
    "encoder_families": (families.RESULTS, families.encoder_table),
    "llm_families": (families.RESULTS, families.llm_table),
    "encoder": (encoder.RESULTS, encoder.table),
    "engines": (engines.RESULTS, engines.table),
    "precision": (precision.RESULTS, precision.table),
    "quality": (quality.RESULTS, quality.table),
    "objectives": (alignment.RESULTS / "alignment-table.json", alignment.table),
    "curves": (alignment.RESULTS / "alignment-curves.json", alignment.curves),
    "quantisation": (quantisation.RESULTS, quantisation.table),
    "full_size": (full_size.RESULTS, full_size.table),
    "llm": (llm.RESULTS, llm.table),
    "streaming": (streaming.RESULTS, streaming.table),
    "streaming_full_size": (streaming.FULL_SIZE, streaming.table),
    "soak": (streaming.SOAK, streaming.soak_table),
    "training_cost": (training_cost.RESULTS, training_cost.table),
    "training_cost_gpu": (training_cost.GPU_RESULTS, training_cost.table),
}
STANDARD = "bench_"  # before the name of a part


def body_of(name: str, folder: Path = RESULTS) -> str:
    """A table and where it was measured; "" for what was not."""
    if name.startswith(STANDARD):
        result = newest(name.removeprefix(STANDARD), folder)
        return (
            f"{tables.TABLES[name.removeprefix(STANDARD)][1](result['parts'])}\n\n{_stamp(result)}"
            if result
            else ""
        )
    results, table = PROGRAMS[name]
    if not results.exists():
        return ""
    report = json.loads(results.read_text(encoding="utf-8"))
    return f"{table(report)}\n\n{_stamp(report)}"


def newest(part: str, folder: Path) -> dict | None:
    """The newest result of `tiny-align bench` that has this part."""
    told = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    standard = [result for result in told if part in result.get("parts", ())]
    return max(standard, key=lambda result: result["date"], default=None)


def render(text: str, body: Callable[[str], str] = body_of) -> str:
    """A document with every marked table made anew; nothing else of it changes."""
    marked = re.compile(r"<!-- table (?P<name>\w+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL)
    return marked.sub(
        lambda m: f"<!-- table {m['name']} -->\n{body(m['name'])}\n<!-- end {m['name']} -->", text
    )


def _stamp(report: dict) -> str:
    machine = report["machine"]
    where = ", ".join(
        str(machine[k]) for k in ("jetson", "gpu", "processor", "cores") if k in machine
    )
    return f"`{report['command']}` on {where} cores, {report['date'][:10]}."


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    old = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    new = {path: render(text) for path, text in old.items()}
    if not args.check:
        for path, text in new.items():
            write_text(path, text)
    print(json.dumps({"up_to_date": old == new}))
    return int(args.check and old != new)


if __name__ == "__main__":
    raise SystemExit(main())
