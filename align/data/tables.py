"""Rows of a table on disk: CSV (RFC 4180; comma, semicolon or tab), JSON lines, or a JSON array of objects.

Each row comes with the place it stands at. What cannot be read as it was meant is refused in one sentence that names
file and line; no field is dropped. Names of columns are compared without case and surrounding space. Nothing here
knows what the columns mean.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tiny_align.runtime.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
CSV_SUFFIXES = (".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".json")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(where, row) for each row that is not blank.

    Args:
        file: a table with one of CSV_SUFFIXES or JSON_SUFFIXES.
        columns: names of which a CSV header must have one; it tells the delimiter.

    Raises:
        DataError: unreadable, not UTF-8, or not the table its name promises.
    """
    text = read_text(file)
    if file.suffix.lower() in CSV_SUFFIXES:
        return _csv_rows(file, text, columns)
    return _json_array(file, text) if text.lstrip().startswith("[") else _json_lines(file, text)


def read_text(file: Path) -> str:
    """A text file's content, line ends as a line feed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); expected a text file that you have the right to read."
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


def described(value) -> str:
    """A value of JSON in words: 'the number 7', 'a list', 'null'."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a list" if isinstance(value, list) else "an object"


# --- CSV ---


def _csv_rows(file: Path, text: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    if not text.strip():
        return
    delimiter = _delimiter(file, text, columns)
    records = _records(file, text, delimiter)
    header = _checked_header(*next(records))
    for where, fields in records:
        _check_count(where, fields, header, delimiter)
        nameless = [value for name, value in zip(header, fields) if not name and value.strip()]
        if nameless:
            raise DataError(
                f"{where}: {nameless[0]!r} stands under an empty name; name its column in the header."
            )
        yield where, {name: value for name, value in zip(header, fields) if name}


def _delimiter(file: Path, text: str, columns: tuple[str, ...]) -> str:
    """The delimiter by which the first line names one of `columns`."""
    line = next(line for line in text.split("\n") if line.strip())
    for delimiter in DELIMITERS:
        names = next(csv.reader([line], delimiter=delimiter))
        if not set(columns).isdisjoint(map(_name, names)):
            return delimiter
    raise DataError(
        f"{file}: the first line, {line[:80]!r}, is no header that names the recordings; expected a column "
        f"{' or '.join(columns)}, with commas, semicolons or tabs between the columns."
    )


def _records(file: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of each record that is not blank."""
    records = _tab_records(text) if delimiter == "\t" else _quoted_records(file, text, delimiter)
    for line, fields in records:
        if any(field.strip() for field in fields):
            yield f"{file}, line {line}", fields


def _tab_records(text: str) -> Iterator[tuple[int, list[str]]]:
    """A record is a line: quotes belong to the text unless they enclose a field as in CSV."""
    for line, record in enumerate(text.split("\n"), start=1):
        yield line, [_unquoted(field) for field in record.split("\t")]


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    enclosed = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner
    return field[1:-1].replace('""', '"') if enclosed else field


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


def _name(column: str) -> str:
    return column.strip().casefold()


def _checked_header(where: str, fields: list[str]) -> list[str]:
    header = [_name(field) for field in fields]
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        raise DataError(
            f"{where}: the header has the name {twice[0]!r} twice; expected each once, rename one."
        )
    return header


def _check_count(where: str, fields: list[str], header: list[str], delimiter: str) -> None:
    if len(fields) == len(header):
        return
    kind = DELIMITERS[delimiter]
    remedy = (
        f"quote a transcript that holds a {kind}"
        if len(fields) > len(header)
        else "add what is missing"
    )
    if len(fields) > len(header) and delimiter == "\t":
        remedy = "take the tab out of the transcript"
    fields_there = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
    raise DataError(f"{where}: {fields_there} where the header has {len(header)}: {remedy}.")


# --- JSON ---


def _json_array(file: Path, text: str) -> Iterator[tuple[str, dict]]:
    for i, row in enumerate(_parsed(text, str(file)), start=1):
        yield f"{file}, row {i}", _checked_object(row, f"{file}, row {i}")


def _json_lines(file: Path, text: str) -> Iterator[tuple[str, dict]]:
    for line, record in enumerate(text.split("\n"), start=1):
        where = f"{file}, line {line}"
        if record.strip():
            yield where, _checked_object(_parsed(record, where), where)


def _parsed(text: str, where: str):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: invalid JSON ({error}); expected one object per line, or one array of objects."
        ) from error


def _object(pairs: list[tuple]) -> dict:
    names = Counter(_name(key) for key, _ in pairs)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"the name {twice[0]!r} twice in one object")
    return {_name(key): value for key, value in pairs}


def _checked_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: got {described(row)}; expected one JSON object per line, or one array of objects."
        )
    return row
