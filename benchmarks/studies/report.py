"""Write the measured tables of README.md and docs/measured.md from benchmarks/results/.

    python -m benchmarks.studies.report            # rewrite both
    python -m benchmarks.studies.report --check    # exit 1 if one is not up to date

No number there is typed: only what lies between a table's markers is replaced. The standard run's
tables are those of its newest result; what was not measured stays blank.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
PROGRAMS: dict[str, tuple[Path, Callable[[dict], str]]] = {  # table -> results, how to show them
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
SECTIONS: dict[str, tuple[Path, str, Callable[[dict], str]]] = {  # -> results, part, how to show it
    "quantised_llms": (quantisation.RESULTS, "llms", quantisation.llm_table),
    "quantised_files": (quantisation.RESULTS, "files", quantisation.file_table),
    "quantised_encoder": (quantisation.RESULTS, "encoder", quantisation.encoder_table),
}
STANDARD = "bench_"  # before the name of a part


def body_of(name: str, folder: Path = RESULTS) -> str:
    """A table and where it was measured; "" for what was not."""
    if name.startswith(STANDARD):
        part = name.removeprefix(STANDARD)
        result = newest(part, folder)
        if result is None:
            return ""
        _, part_table = tables.TABLES[part]
        return f"{part_table(result['parts'])}\n\n{stamp_line(result)}"
    if name in SECTIONS:
        results, part, table = SECTIONS[name]
        report = read(results).get(part) if results.exists() else None
    else:
        results, table = PROGRAMS[name]
        report = read(results) if results.exists() else None
    if report is None:
        return ""
    return f"{table(report)}\n\n{stamp_line(report)}"


def newest(part: str, folder: Path) -> dict[str, Any] | None:
    """The newest result of `tiny-align bench` that has this part."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read(path)
        if part in result.get("parts", ()):
            found.append(result)
    return max(found, key=lambda result: result["date"], default=None)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def stamp_line(report: dict[str, Any]) -> str:
    """By what command, where and when a report was measured."""
    machine = report["machine"]
    names = ("jetson", "gpu", "processor", "cores")
    where = ", ".join(str(machine[name]) for name in names if name in machine)
    return f"`{report['command']}` on {where} cores, {report['date'][:10]}."


def render(text: str, body: Callable[[str], str] = body_of) -> str:
    """A document with every marked table made anew; nothing else of it changes."""
    marked = re.compile(r"<!-- table (?P<name>\w+) -->\n.*?<!-- end (?P=name) -->", re.DOTALL)

    def replacement(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table {name} -->\n{body(name)}\n<!-- end {name} -->"

    return marked.sub(replacement, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    up_to_date = True
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            up_to_date = False
            if not args.check:
                write_text(path, new)
    print(json.dumps({"up_to_date": up_to_date}))
    return int(args.check and not up_to_date)


if __name__ == "__main__":
    raise SystemExit(main())
