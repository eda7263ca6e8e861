"""The only producer of the README's numbers, and what all of its programs share."""

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from tiny_align.runtime.files import write_json
from tiny_align.runtime.machine import describe


def new_parser(description: str | None, out: Path | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: `--out` with a default, and `--json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=out, help="where the results go")
    parser.add_argument("--json", action="store_true", help="stdout gets the JSON document alone")
    return parser


def stamp(command: str) -> dict[str, Any]:
    """Where, when and how a report was measured: its first entries."""
    return {"machine": describe(), "date": str(date.today()), "command": command}


def finish(report: dict[str, Any], args: argparse.Namespace, table: str) -> int:
    """End a benchmark: write the results, print the table and the document, return the exit status.

    The document is the last line of stdout; with `--json` the table goes to stderr.
    """
    write_json(args.out, report)
    print(table, file=sys.stderr if args.json else sys.stdout)
    print(json.dumps(report))
    return 0
