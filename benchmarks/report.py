"""Writes the README's measured tables from benchmarks/results/: no number there is typed.

python -m benchmarks.report            # rewrite README.md
python -m benchmarks.report --check    # exit 1 if it is not up to date
"""

import argparse
import json
from pathlib import Path

from tiny_align.benchmarks import (
    alignment,
    encoder,
    engines,
    families,
    full_size,
    llm,
    quality,
    quantisation,
    training_cost,
)
from tiny_align.runtime.files import write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TABLES = {
    "encoder_families": (families.RESULTS, families.encoder_table),
    "llm_families": (families.RESULTS, families.llm_table),
    "encoder": (encoder.RESULTS, encoder.table),
    "engines": (engines.RESULTS, engines.table),
    "quality": (quality.RESULTS, quality.table),
    "objectives": (alignment.RESULTS / "alignment-table.json", alignment.table),
    "curves": (alignment.RESULTS / "alignment-curves.json", alignment.curves),
    "quantisation": (quantisation.RESULTS, quantisation.table),
    "full_size": (full_size.RESULTS, full_size.table),
    "llm": (llm.RESULTS, llm.table),
    "training_cost": (training_cost.RESULTS, training_cost.table),
}


def render(text: str) -> str:
    """README text with every marked table made anew."""
    for name, (results, table) in TABLES.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        report = json.loads(results.read_text(encoding="utf-8"))
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = f"{head}{begin}\n{table(report)}\n\n{_stamp(report)}\n{end}{tail}"
    return text


def _stamp(report: dict) -> str:
    machine = report["machine"]
    where = ", ".join(str(machine[k]) for k in ("jetson", "processor", "cores") if k in machine)
    return f"`{report['command']}` on {where} cores, {report['date']}."


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if not args.check:
        write_text(README, new)
    print(json.dumps({"up_to_date": old == new}))
    return int(args.check and old != new)


if __name__ == "__main__":
    raise SystemExit(main())
