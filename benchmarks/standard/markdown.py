"""Markdown of rows and columns."""

from collections.abc import Iterable, Sequence


def grid(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
