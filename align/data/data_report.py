"""What became of a data set's rows: how many are used, how many are left out, and why.

A recording or transcript that cannot be used is left out and named; the rest of the data set is
used. Recordings that are used although something is odd about them (clipped, quiet) are counted by
what is odd. Nothing here reads files.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.errors import AudioError, DataError

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass
class Reason:
    """Why rows were left out, or what is odd about them: how many, and the first of them."""

    count: int
    example: str


@dataclass
class DataReport:
    """Filled while a data set is read and used; printed on stderr and part of the JSON document."""

    used: dict[str, int] = field(default_factory=dict)  # split -> rows
    reasons: dict[str, Reason] = field(default_factory=dict)  # why rows were left out
    notes: dict[str, Reason] = field(default_factory=dict)  # what is odd about rows that are used
    _messages: set[str] = field(default_factory=set)  # that are counted in `notes`

    @property
    def left_out(self) -> int:
        """How many rows were left out."""
        return sum(reason.count for reason in self.reasons.values())

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count rows that are not used; the report shows the first example of each reason."""
        self.reasons.setdefault(reason, Reason(0, example)).count += count

    def leave_out_utterance(self, utterance: Utterance, error: str) -> None:
        """Count one utterance and name it in the log.

        Args:
            error: what is wrong with it; may begin with the file's name.
        """
        log.warning("left out %s: %s", utterance.audio, error)
        name = utterance.audio.name
        message = error.replace(str(utterance.audio), name)
        example = message if message.startswith(name) else f"{name}: {message}"
        self.leave_out(_kind(message, name), example)

    def add_note(self, message: str) -> None:
        """Count what is odd about a recording, 'NAME: WHAT', each message once."""
        if message in self._messages:
            return
        self._messages.add(message)
        kind = _kind(message.partition(": ")[2], "")
        self.notes.setdefault(kind, Reason(0, message)).count += 1

    @contextlib.contextmanager
    def count_notes(self) -> Iterator[None]:
        """Count the audio reader's warnings within this block instead of logging them."""
        reader_log = logging.getLogger("tiny_align.runtime.audio.samples")
        handler = _NoteHandler(self)
        propagate = reader_log.propagate
        reader_log.addHandler(handler)
        reader_log.propagate = False
        try:
            yield
        finally:
            reader_log.removeHandler(handler)
            reader_log.propagate = propagate

    def first(self, utterances: list[Utterance], n: int | None, where: str) -> list[Utterance]:
        """The first `n` utterances (None: all); the others are left out."""
        rest = utterances[n:] if n is not None else []
        if rest:
            self.leave_out(f"beyond the first {n} {where}", rest[0].audio.name, len(rest))
        return utterances[:n]

    def document(self) -> dict:
        """The report as part of a command's JSON document."""
        reasons = [
            {"reason": name, "count": reason.count, "example": reason.example}
            for name, reason in self.reasons.items()
        ]
        notes = [
            {"note": name, "count": note.count, "example": note.example}
            for name, note in self.notes.items()
        ]
        return {**self.used, "left_out": self.left_out, "reasons": reasons, "notes": notes}

    def __str__(self) -> str:
        parts = []
        if self.used:
            used = ", ".join(f"{count} {split}" for split, count in self.used.items())
            parts.append(f"data: {used} used")
        if self.reasons:
            parts.append(self.explained())
        if self.notes:
            parts.append(f"used, though: {_enumerate(self.notes, ', ')}")
        return "; ".join(parts)

    def explained(self) -> str:
        """'left out 3: without words (2, e.g. ...); unintelligible (1, e.g. ...)', or nothing."""
        if not self.reasons:
            return ""
        return f"left out {self.left_out}: {_enumerate(self.reasons, '; ')}"


class _NoteHandler(logging.Handler):
    """Gives the warnings of a logger to a report."""

    def __init__(self, report: DataReport):
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.add_note(record.getMessage())


def each_usable(
    utterances: Iterable[Utterance], use: Callable[[Utterance], T], report: DataReport
) -> Iterator[tuple[Utterance, T]]:
    """(utterance, use(utterance)) of each that can be used; `report` names the others."""
    for utterance in utterances:
        try:
            with report.count_notes():
                result = use(utterance)
        except (AudioError, DataError) as error:
            report.leave_out_utterance(utterance, str(error))
        except OSError as error:
            if error.filename != str(utterance.audio):
                raise
            message = f"{utterance.audio}: cannot be read ({error.strerror})"
            report.leave_out_utterance(utterance, message)
        else:
            yield utterance, result


def _enumerate(reasons: dict[str, Reason], separator: str) -> str:
    items = []
    for name, reason in reasons.items():
        items.append(f"{name} ({reason.count}, e.g. {reason.example.rstrip('.')})")
    return separator.join(items)


def _kind(error: str, name: str) -> str:
    """The first clause of an error without its file and numbers: 'lasts … s' if too short."""
    clause = re.sub(rf"^{re.escape(name)}( \[[^\]]*\])?:?\s*", "", error)
    clause = re.split(r"[,;:(]", clause)[0]
    return re.sub(r"-?\d[\d.]*", "…", clause).strip(" .")
