"""What became of a data set's rows: how many are used in each split, how many are left out, and why.

A recording or transcript that cannot be used is left out and named; the others go on. Recordings that are used though
something is odd about them (clipped, quiet) are counted by what it is. Nothing here reads files.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tiny_align.runtime.errors import AudioError, DataError

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
    reasons: dict[str, Reason] = field(default_factory=dict)
    notes: dict[str, Reason] = field(default_factory=dict)  # of rows that are used
    _noted: set[str] = field(default_factory=set)

    @property
    def left_out(self) -> int:
        return sum(reason.count for reason in self.reasons.values())

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        """Count rows that are not used; the first example given for a reason is kept."""
        self.reasons.setdefault(reason, Reason(0, example)).count += count

    def leave_out_utterance(self, utterance, error: str) -> None:
        """Count one utterance and name it in the log; `error` says what is wrong with it, file name first or not."""
        log.warning("left out %s: %s", utterance.audio, error)
        said = error.replace(str(utterance.audio), utterance.audio.name)
        example = (
            said if said.startswith(utterance.audio.name) else f"{utterance.audio.name}: {said}"
        )
        self.leave_out(_kind(said, utterance.audio.name), example)

    @contextlib.contextmanager
    def counting_notes(self) -> Iterator[None]:
        """What reading audio notes in this block is counted here, each note once, instead of being logged."""
        reading, handler = (
            logging.getLogger("tiny_align.runtime.audio.samples"),
            logging.Handler(logging.WARNING),
        )
        handler.emit = lambda record: self._note(record.getMessage())
        reading.addHandler(handler)
        propagated, reading.propagate = reading.propagate, False
        try:
            yield
        finally:
            reading.removeHandler(handler)
            reading.propagate = propagated

    def _note(self, note: str) -> None:
        if note not in self._noted:
            self._noted.add(note)
            what = _kind(note.partition(": ")[2], "")
            self.notes.setdefault(what, Reason(0, note)).count += 1

    def first(self, utterances: list, n: int | None, where: str) -> list:
        """The first `n` utterances (None: all); the others are left out."""
        rest = utterances[n:] if n is not None else []
        if rest:
            self.leave_out(f"beyond the first {n} {where}", rest[0].audio.name, len(rest))
        return utterances[:n]

    def document(self) -> dict:
        reasons = [
            {"reason": why, "count": r.count, "example": r.example}
            for why, r in self.reasons.items()
        ]
        notes = [
            {"note": what, "count": r.count, "example": r.example} for what, r in self.notes.items()
        ]
        return {**self.used, "left_out": self.left_out, "reasons": reasons, "notes": notes}

    def __str__(self) -> str:
        used = ", ".join(f"{count} {split}" for split, count in self.used.items())
        noted = ", ".join(f"{what} ({r.count}, e.g. {r.example})" for what, r in self.notes.items())
        parts = [
            f"data: {used} used" if used else "",
            self.explained(),
            f"used, though: {noted}" if noted else "",
        ]
        return "; ".join(filter(None, parts))

    def explained(self) -> str:
        """'left out 3: nothing was heard (2, e.g. ...); unintelligible (1, e.g. ...)', or nothing."""
        reasons = [
            f"{why} ({r.count}, e.g. {r.example.rstrip('.')})" for why, r in self.reasons.items()
        ]
        return f"left out {self.left_out}: {'; '.join(reasons)}" if reasons else ""


def each_usable(utterances: Iterable, use: Callable, report: DataReport) -> Iterator[tuple]:
    """(utterance, use(utterance)) for those that can be used; each other one is left out and named in `report`."""
    for utterance in utterances:
        try:
            with report.counting_notes():
                result = use(utterance)
        except (AudioError, DataError) as error:
            report.leave_out_utterance(utterance, str(error))
        except OSError as error:
            if error.filename != str(utterance.audio):
                raise
            report.leave_out_utterance(
                utterance, f"{utterance.audio}: cannot be read ({error.strerror})"
            )
        else:
            yield utterance, result


def _kind(error: str, name: str) -> str:
    """The first clause of an error without the file's name and numbers: 'lasts … s' for each that is too short."""
    clause = re.sub(rf"^{re.escape(name)}( \[[^\]]*\])?:?\s*", "", error)
    return re.sub(r"-?\d[\d.]*", "…", re.split(r"[,;:(]", clause)[0]).strip(" .")
