"""Rows of a table -> utterances: metadata files, NeMo manifests, Common Voice.

The forms differ in the names of their columns only. A manifest (`audio_filepath`) may use a part of
a file; Common Voice's paths leave out the folder clips/. Texts are NFC and otherwise as
transcribed.
"""

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from tiny_align.align.data.file_finder import FileFinder
from tiny_align.align.data.splits import SPLITS, split_by_folders, split_by_name, split_by_text
from tiny_align.align.data.tables import CSV_SUFFIXES, Row, describe, read_rows
from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.errors import DataError

# Of several columns, the first one that is present is taken.
AUDIO_COLUMNS = ("file_name", "audio_filepath", "audio_path", "path", "audio", "file")
TEXT_COLUMNS = ("transcription", "text", "sentence", "transcript")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
TIMED_COLUMN = "audio_filepath"  # a manifest's: offset and duration choose a part of the file
CLIPS = "clips"  # Common Voice's folder, which its tables leave out
MAX_S = 1e9  # of a manifest's offset or duration


def read_table(file: Path, split: str | None, finder: FileFinder) -> Iterator[Utterance]:
    """The utterances of a table, in its order.

    Args:
        split: of rows that have no other: by a column, or by a folder in the audio's path.

    Raises:
        DataError: a bad row, or audio that is missing.
    """
    is_csv = file.suffix.lower() in CSV_SUFFIXES
    rows: list[_TableRow] = []
    names: list[str] = []
    for where, values in read_rows(file, AUDIO_COLUMNS):
        row = _TableRow(where, values)
        rows.append(row)
        names.append(row.text(AUDIO_COLUMNS))
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    base = os.path.dirname(os.path.commonpath(absolute)) if absolute else ""
    for row, name in zip(rows, names):
        if is_csv:
            row.parse_numbers("offset", "duration")
        audio = _find_audio(row, name, file.parent, finder)
        text = unicodedata.normalize("NFC", " ".join(row.text(TEXT_COLUMNS).split()))
        start_s, end_s = row.times()
        speaker = row.label(SPEAKER_COLUMNS)
        row_split = row.own_split() or split_by_folders(_folders(name, file.parent, base))
        row_split = row_split or split or split_by_text(text)
        yield Utterance(audio, text, row_split, start_s, end_s, speaker)


@dataclass
class _TableRow:
    """A row and its place in the file, which begins every message about it."""

    where: str
    values: Row

    def parse_numbers(self, *columns: str) -> None:
        """Turn CSV's text into the numbers that JSON has; what is no number is refused later."""
        for column in columns:
            text = self.values.get(column)
            if isinstance(text, str):
                with contextlib.suppress(ValueError):
                    self.values[column] = float(text) if text.strip() else None

    def text(self, columns: tuple[str, ...]) -> str:
        """The text in the first of `columns` that has one."""
        present = [name for name in columns if name in self.values]
        if not present:
            raise DataError(
                f"{self.where}: no text in the field {' or '.join(columns)}; "
                f"the row has {', '.join(self.values) or 'nothing'}. Add it or remove the row."
            )
        filled = [name for name in present if self.values[name] is not None]
        name = (filled or present)[0]
        value = self.values[name]
        if not isinstance(value, str):
            raise DataError(
                f"{self.where}: the field {name} holds {describe(value)}; "
                "expected text, write it in quotes."
            )
        if not value.strip():
            raise DataError(
                f"{self.where}: no text in the field {name}, it is empty; add it or remove the row."
            )
        if not value.isprintable() and re.search("[\ud800-\udfff]", value):
            raise DataError(
                f"{self.where}: the field {name} holds half a character ({value!r}); "
                "expected text, correct it."
            )
        return value

    def label(self, columns: tuple[str, ...]) -> str | None:
        """A text or a number that names something, such as a speaker; None: there is none."""
        for name in columns:
            value = self.values.get(name)
            if value is None or value == "":
                continue
            if isinstance(value, bool) or not isinstance(value, (str, int)):
                raise DataError(
                    f"{self.where}: the field {name} holds {describe(value)}; "
                    "expected text, correct it."
                )
            return str(value).strip() or None
        return None

    def times(self) -> tuple[float | None, float | None]:
        """Start and end in seconds from a manifest's offset and duration; None: the file's own."""
        if TIMED_COLUMN not in self.values:
            return None, None
        offset = self._seconds("offset")
        duration = self._seconds("duration")
        if duration is None:
            return offset, None
        if duration == 0:
            raise DataError(
                f"{self.where}: duration is 0; "
                "expected seconds above 0, correct it or remove the row."
            )
        return offset, (offset or 0.0) + duration

    def _seconds(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MAX_S:
            raise DataError(
                f"{self.where}: {name} is {value!r}; expected seconds, a number from 0 up."
            )
        return float(value)

    def own_split(self) -> str | None:
        """The row's split, by its own name if it is an unknown one; None: the row has none."""
        value = self.values.get("split")
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise DataError(
                f"{self.where}: the field split holds {describe(value)}; "
                f"expected {', '.join(SPLITS)}."
            )
        return split_by_name(value) or value.strip() or None


def _find_audio(row: _TableRow, name: str, folder: Path, finder: FileFinder) -> Path:
    audio = finder.find(folder, name) or finder.find(folder / CLIPS, name)
    if audio is None:
        column = next(column for column in AUDIO_COLUMNS if column in row.values)
        raise DataError(
            f"{row.where}: audio file {folder / name} does not exist; "
            f"put it there or correct {column}."
        )
    return audio


def _folders(name: str, folder: Path, base: str) -> tuple[str, ...]:
    """The folders in an audio path that may name a split.

    Of an absolute path, these are below the table's folder or, if it lies elsewhere, below `base`:
    the parent of the folder that all absolute paths share. Folders above say nothing about a split.
    """
    name = name.replace("\\", "/")
    if os.path.isabs(name):
        inside = PurePath(name).is_relative_to(folder.resolve())
        name = os.path.relpath(name, folder.resolve() if inside else base)
    return PurePath(name).parts[:-1]
