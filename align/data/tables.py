"""Rows of a table on disk.

A table is CSV (RFC 4180; comma, semicolon or tab), JSON lines, or a JSON array of objects. Each row
comes with its place in the file. What cannot be read without guessing is refused in one sentence
that names file and line; no field is dropped. Column names are compared without case and
surrounding space. Nothing here knows what the columns mean.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from tiny_align.runtime.errors import DataError

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
Row: TypeAlias = dict[str, JsonValue]  # column -> value; of a CSV file, every value is text

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
CSV_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".json")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
ONE_OBJECT = "expected one JSON object per line, or one array of objects"


def read_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row that is not blank; `where` is, for example, 'data.csv, line 3'.

    Args:
        file: a table with one of CSV_SUFFIXES or JSON_SUFFIXES.
        columns: a CSV header must have one of these names; the delimiter is recognised by it.

    Raises:
        DataError: unreadable, not UTF-8, or not the table its name promises.
    """
    text = read_text(file)
    if file.suffix.lower() in CSV_SUFFIXES:
        return _csv_rows(file, text, columns)
    return _json_rows(file, text)


def read_text(file: Path) -> str:
    """A text file's content with line feeds as line ends.

    Raises:
        DataError: unreadable or not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); "
            "expected a text file that you have the right to read."
        ) from error
    if content.startswith(UTF16_MARKS) or b"\0" in content:
        raise DataError(
            f"{file}: is UTF-16 or no text; expected UTF-8, save it as UTF-8 (Excel: 'CSV UTF-8')."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: not UTF-8 text (at byte {error.start}); save it as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def describe(value: JsonValue) -> str:
    """A JSON value in words: 'the number 7', 'a list', 'null'."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a list" if isinstance(value, list) else "an object"


def _normalise_name(column: str) -> str:
    return column.strip().casefold()


# --- CSV ---


def _csv_rows(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[tuple[str, Row]]:
    if not text.strip():
        return
    delimiter = _find_delimiter(file, text, columns)
    records = _csv_records(file, text, delimiter)
    where, fields = next(records)
    header = [_normalise_name(field) for field in fields]
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(
                f"{where}: the header has the name {name!r} twice; expected each once, rename one."
            )
    for where, fields in records:
        _check_count(where, fields, header, delimiter)
        row: Row = {}
        for name, value in zip(header, fields):
            if name:
                row[name] = value
            elif value.strip():
                raise DataError(
                    f"{where}: {value!r} stands under an empty name; name its column in the header."
                )
        yield where, row


def _find_delimiter(file: Path, text: str, columns: tuple[str, ...]) -> str:
    """The delimiter with which the first line has one of `columns`."""
    line = next(line for line in text.split("\n") if line.strip())
    for delimiter in DELIMITERS:
        fields = next(csv.reader([line], delimiter=delimiter))
        if any(_normalise_name(field) in columns for field in fields):
            return delimiter
    raise DataError(
        f"{file}: the first line, {line[:80]!r}, is no header that names the recordings; expected "
        f"a column {' or '.join(columns)}, with commas, semicolons or tabs between the columns."
    )


def _csv_records(file: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of each record that is not blank."""
    records = _tab_records(text) if delimiter == "\t" else _quoted_records(file, text, delimiter)
    for line, fields in records:
        if any(field.strip() for field in fields):
            yield f"{file}, line {line}", fields


def _tab_records(text: str) -> Iterator[tuple[int, list[str]]]:
    """A record is a line: quotes belong to the text unless they enclose a field as in CSV."""
    for line, record in enumerate(text.split("\n"), start=1):
        yield line, [_unquote(field) for field in record.split("\t")]


def _unquote(field: str) -> str:
    if len(field) < 2 or field[0] != '"' or field[-1] != '"':
        return field
    inner = field[1:-1]
    if '"' in inner.replace('""', ""):
        return field
    return inner.replace('""', '"')


def _quoted_records(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}, line {line}: invalid CSV in the row that begins here ({error}); "
            'close its quotes, and double a quote inside quotes ("").'
        ) from error


def _check_count(where: str, fields: list[str], header: list[str], delimiter: str) -> None:
    if len(fields) == len(header):
        return
    if len(fields) < len(header):
        remedy = "add what is missing"
    elif delimiter == "\t":
        remedy = "take the tab out of the transcript"
    else:
        remedy = f"quote a transcript that holds a {DELIMITERS[delimiter]}"
    plural = "s" if len(fields) > 1 else ""
    raise DataError(
        f"{where}: {len(fields)} field{plural} where the header has {len(header)}: {remedy}."
    )


# --- JSON ---


def _json_rows(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    if text.lstrip().startswith("["):
        values = _parse(text, str(file))
        assert isinstance(values, list)
        for i, value in enumerate(values, start=1):
            where = f"{file}, row {i}"
            yield where, _checked_object(value, where)
        return
    for line, record in enumerate(text.split("\n"), start=1):
        where = f"{file}, line {line}"
        if record.strip():
            yield where, _checked_object(_parse(record, where), where)


def _parse(text: str, where: str) -> JsonValue:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: invalid JSON ({error}); {ONE_OBJECT}.") from error


def _object(pairs: list[tuple[str, JsonValue]]) -> Row:
    """A JSON object under normalised names, which must differ."""
    row: Row = {}
    for key, value in pairs:
        name = _normalise_name(key)
        if name in row:
            raise ValueError(f"the name {name!r} twice in one object")
        row[name] = value
    return row


def _checked_object(row: JsonValue, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {describe(row)}; {ONE_OBJECT}.")
    return row
