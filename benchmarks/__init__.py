"""The only producer of the README's numbers."""

import json
import sys

from tiny_align.runtime.files import write_json


def finish(report: dict, args, table: str) -> int:
    """The end of every benchmark: the results' file, the table for people and, last, the document; its exit status."""
    write_json(args.out, report)
    print(table, file=sys.stderr if args.json else sys.stdout)
    print(json.dumps(report))
    return 0
