"""A person's recordings with what they said, from the forms people already have.

Recognised are a table (CSV, tab-separated text, JSON lines or a JSON array) that names recordings and texts, by itself,
as a folder's metadata file, as one file for each split or in each split's folder (Hugging Face's "audiofolder", NeMo's
manifests, Common Voice); and CHAT transcripts (TalkBank's .cha) beside their media. Texts are NFC and otherwise as
transcribed. This reads no audio until `Utterance.load`, downloads nothing and neither lower-cases nor tokenizes.
"""

import logging
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

from tiny_align.align.data.chat import clean_chat, read_transcript
from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.tables import CSV_SUFFIXES, JSON_SUFFIXES, described, read_rows
from tiny_align.runtime.audio.samples import read_audio, read_segment
from tiny_align.runtime.errors import DataError

__all__ = ["Utterance", "clean_chat", "leave_out_unknown_splits", "load_dataset", "split_of"]

log = logging.getLogger(__name__)

FORMS = (
    "a folder with metadata.jsonl or metadata.csv (file_name, transcription), "
    "a .jsonl manifest (audio_filepath, text), or CHAT transcripts (.cha) beside their audio"
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json")
TABLE_SUFFIXES = (*CSV_SUFFIXES, *JSON_SUFFIXES)  # NeMo calls its JSON lines .json
MEDIA_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
AUDIO_COLUMNS = (
    "file_name",
    "audio_filepath",
    "audio_path",
    "path",
    "audio",
    "file",
)  # the first one present is taken
TEXT_COLUMNS = ("transcription", "text", "sentence", "transcript")
TIMED_COLUMN = "audio_filepath"  # a manifest's: offset and duration choose a part of the file
CLIPS = "clips"  # Common Voice's folder, which its tables leave out
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
TEST_ONE_IN = 5
MAX_S = 1e9  # of a manifest's offset or duration


@dataclass(frozen=True)
class Utterance:
    """One thing said: where to hear it and what it was."""

    audio: Path
    text: str
    split: str
    start_s: float | None = None  # None: from the beginning
    end_s: float | None = None  # None: to the end
    speaker: str | None = None

    def load(self, sample_rate: int) -> np.ndarray:
        """(S,) float32 at `sample_rate`; raises AudioError, as runtime/audio/samples.py does."""
        if self.start_s is None and self.end_s is None:
            return read_audio(self.audio, sample_rate)
        return read_segment(self.audio, sample_rate, self.start_s or 0.0, self.end_s)


def load_dataset(
    path: Path | str, speaker: str | None = None, report: DataReport | None = None
) -> list[Utterance]:
    """The utterances of a data set, in the order of its files.

    Args:
        path: one of FORMS.
        speaker: only this person; for CHAT a speaker's code, by default PAR or the only one there is.
        report: counts what is left out; None: the log says it.

    Raises:
        DataError: nothing there, an unknown form, a bad row, audio that is missing, or no utterances.
    """
    path, counted = Path(path), report or DataReport()
    try:
        utterances = _load(path, speaker, counted)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read ({error.strerror}); give a path you have the right to read."
        ) from error
    if not utterances:
        explained = counted.explained() or "it holds no row"
        raise DataError(
            f"{path}: no utterances; expected at least one recording with its text ({explained})."
        )
    if report is None and counted.left_out:
        log.warning("%s: %s", path, counted.explained())
    return utterances


def split_of(utterances: Iterable[Utterance], name: str) -> list[Utterance]:
    """The utterances of one split, by any of its names, or a DataError that lists the splits there are."""
    utterances = list(utterances)
    wanted = _known_split(name) or name
    chosen = [utterance for utterance in utterances if utterance.split == wanted]
    if not chosen:
        counts = Counter(utterance.split for utterance in utterances)
        there = ", ".join(f"{split} ({count})" for split, count in sorted(counts.items())) or "none"
        raise DataError(
            f"no utterances in split {name!r}, expected one of: {there}; set `split` in the data set."
        )
    return chosen


def leave_out_unknown_splits(utterances: Iterable[Utterance], report: DataReport) -> None:
    """Count what is in no split that a training uses."""
    for utterance in utterances:
        if utterance.split not in SPLITS:
            report.leave_out(
                f"of split {utterance.split!r}, none of {', '.join(SPLITS)}", utterance.audio.name
            )


def _load(path: Path, speaker: str | None, report: DataReport) -> list[Utterance]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {FORMS}.")
    files = _Files()
    if tables := _tables(path):
        utterances = [u for table, split in tables for u in _read_table(table, split, files)]
        return _of_speaker(utterances, speaker, path, report)
    if transcripts := _transcripts(path):
        return [u for file in transcripts for u in _read_chat(file, path, speaker, files, report)]
    raise DataError(f"{path}: {_unknown(path)}; expected {FORMS}.")


# --- which files ---


def _tables(path: Path) -> list[tuple[Path, str | None]]:
    """The tables of a data set, each with the split that its own name or folder gives it."""
    if not path.is_dir():
        named = _known_split(path.stem)  # a training set by itself has its own test set drawn
        return (
            [(path, None if named == "train" else named)]
            if path.suffix.lower() in TABLE_SUFFIXES
            else []
        )
    if metadata := _one_of_each([path / name for name in METADATA_FILES if (path / name).exists()]):
        return [(metadata[0], None)]
    inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in TABLE_SUFFIXES]
    if named := [file for file in inside if _known_split(file.stem)]:
        if others := [file.name for file in inside if file not in named]:
            log.warning("%s: not read, as its name is no split's: %s", path, ", ".join(others))
        return [(file, _known_split(file.stem)) for file in _one_of_each(named)]
    nested = [
        file
        for depth in ("*", "*/*")
        for name in METADATA_FILES
        for file in path.glob(f"{depth}/{name}")
    ]
    return [
        (file, _split_of_folders(file.relative_to(path).parts[:-1]))
        for file in _one_of_each(sorted(nested))
    ]


def _one_of_each(files: list[Path]) -> list[Path]:
    """The files, unless two differ in their form only: which one is meant, nobody knows."""
    for one, other in zip(files, files[1:]):
        if one.with_suffix("") == other.with_suffix(""):
            raise DataError(
                f"{one.parent}: holds both {one.name} and {other.name}; expected one of them, remove the other "
                "or give the file itself."
            )
    return files


def _transcripts(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".cha" else []
    found = (file for file in path.rglob("*") if file.suffix.lower() == ".cha")
    return sorted(
        file for file in found if not file.name.startswith("._")
    )  # what macOS puts beside a file


def _unknown(path: Path) -> str:
    """What is there instead of a data set."""
    if not path.is_dir():
        return "a file of no known form"
    tables = sorted(file.name for file in path.iterdir() if file.suffix.lower() in TABLE_SUFFIXES)
    hint = f" (give {' or '.join(tables[:3])} itself, if it is one)" if tables else ""
    return f"a folder of no known form{hint}"


@dataclass
class _Files:
    """Finds files whose names may be spelt in another Unicode normalisation form than on disk."""

    names: dict[Path, dict[str, str]] = field(
        default_factory=dict
    )  # folder -> NFC name -> name on disk

    def find(self, folder: Path, name: str) -> Path | None:
        """The file `name` in `folder`, which may also be written as on Windows; None: there is none."""
        for spelling in dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))):
            found = folder / spelling
            found = found if found.is_file() else self._by_parts(folder, PurePath(spelling))
            if found and found.is_file():
                return found
        return None

    def _by_parts(self, folder: Path, name: PurePath) -> Path | None:
        for part in name.parts:
            if not (folder / part).exists():
                part = self._listed(folder).get(unicodedata.normalize("NFC", part))
            if part is None:
                return None
            folder = folder / part
        return folder

    def _listed(self, folder: Path) -> dict[str, str]:
        if folder not in self.names:
            names = os.listdir(folder) if folder.is_dir() else []
            self.names[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return self.names[folder]


# --- rows ---


def _read_table(file: Path, split: str | None, files: _Files) -> Iterator[Utterance]:
    rows = [
        (where, row, _row_text(row, AUDIO_COLUMNS, where))
        for where, row in read_rows(file, AUDIO_COLUMNS)
    ]
    absolute = [os.path.dirname(name) for _, _, name in rows if os.path.isabs(name)]
    base = os.path.dirname(os.path.commonpath(absolute)) if absolute else ""
    for where, row, name in rows:
        if file.suffix.lower() in CSV_SUFFIXES:
            row |= {
                column: _number(row[column]) for column in ("offset", "duration") if column in row
            }
        audio, text = (
            _audio(row, name, where, file.parent, files),
            _tidy(_row_text(row, TEXT_COLUMNS, where)),
        )
        start_s, end_s = _times(row, where) if TIMED_COLUMN in row else (None, None)
        speaker = _label(row, ("speaker", "speaker_id"), where)
        folders = PurePath(_below(name.replace("\\", "/"), file.parent, base)).parts[:-1]
        chosen = (
            _row_split(row, where) or _split_of_folders(folders) or split or _split_of_text(text)
        )
        yield Utterance(audio, text, chosen, start_s, end_s, speaker)


def _row_text(row: dict, names: tuple[str, ...], where: str) -> str:
    present = [name for name in names if name in row]
    if not present:
        wanted, there = " or ".join(names), ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{where}: no text in the field {wanted}; the row has {there}. Add it or remove the row."
        )
    name = next((name for name in present if row[name] is not None), present[0])
    value = row[name]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the field {name} holds {described(value)}; expected text, write it in quotes."
        )
    if not value.strip():
        raise DataError(
            f"{where}: no text in the field {name}, it is empty; add it or remove the row."
        )
    if not value.isprintable() and re.search("[\ud800-\udfff]", value):
        raise DataError(
            f"{where}: the field {name} holds half a character ({value!r}); expected text, correct it."
        )
    return value


def _audio(row: dict, name: str, where: str, folder: Path, files: _Files) -> Path:
    found = files.find(folder, name) or files.find(folder / CLIPS, name)
    if found is None:
        column = next(column for column in AUDIO_COLUMNS if column in row)
        raise DataError(
            f"{where}: audio file {folder / name} does not exist; put it there or correct {column}."
        )
    return found


def _tidy(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _label(row: dict, names: tuple[str, ...], where: str) -> str | None:
    """A text or a number that names something, such as a speaker; None: there is none."""
    name = next((name for name in names if row.get(name) not in (None, "")), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{where}: the field {name} holds {described(value)}; expected text, correct it."
        )
    return str(value).strip() or None


def _times(row: dict, where: str) -> tuple[float | None, float | None]:
    """Start and end in seconds from a manifest's offset and duration."""
    offset, duration = (_seconds(row, name, where) for name in ("offset", "duration"))
    if duration == 0:
        raise DataError(
            f"{where}: duration is 0; expected seconds above 0, correct it or remove the row."
        )
    return offset, None if duration is None else (offset or 0.0) + duration


def _number(text: str) -> float | str | None:
    """A CSV field as JSON has it: a number, nothing, or else the text, to be refused."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text


def _seconds(row: dict, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MAX_S:
        raise DataError(f"{where}: {name} is {value!r}; expected seconds, a number from 0 up.")
    return float(value)


# --- splits ---


def _known_split(name: str) -> str | None:
    """The split of one of its usual names, alone or first: train, Training, dev-clean, test.other."""
    first = re.split(r"[-._ \d]", name.strip().casefold(), maxsplit=1)[0]
    return next((split for split, names in SPLITS.items() if first in names), None)


def _row_split(row: dict, where: str) -> str | None:
    """What the row says, a split that nobody knows too."""
    if row.get("split") in (None, ""):
        return None
    if not isinstance(row["split"], str):
        raise DataError(
            f"{where}: the field split holds {described(row['split'])}; expected {', '.join(SPLITS)}."
        )
    return _known_split(row["split"]) or row["split"].strip() or None


def _split_of_folders(folders: Iterable[str]) -> str | None:
    """The split that the innermost folder with a split's name tells."""
    return next(filter(None, map(_known_split, reversed(list(folders)))), None)


def _below(name: str, folder: Path, base: str) -> str:
    """An absolute path from the table's folder on or, outside, from `base`: what lies above says nothing of a split."""
    if not os.path.isabs(name):
        return name
    inside = PurePath(name).is_relative_to(folder.resolve())
    return os.path.relpath(name, folder.resolve() if inside else base)


def _split_of_text(text: str) -> str:
    """Always the same for the same sentence: a repetition of it never lands in the other split."""
    return "train" if zlib.crc32(text.casefold().encode(errors="replace")) % TEST_ONE_IN else "test"


def _of_speaker(
    utterances: list[Utterance], speaker: str | None, path: Path, report: DataReport
) -> list[Utterance]:
    if speaker is None:
        return utterances
    chosen = [utterance for utterance in utterances if utterance.speaker == speaker]
    if not chosen:
        there = ", ".join(sorted({utterance.speaker or "(none given)" for utterance in utterances}))
        raise DataError(f"{path}: nothing by speaker {speaker!r}; its speakers are: {there}.")
    for utterance in utterances:
        if utterance.speaker != speaker:
            report.leave_out(
                "by another speaker",
                f"{utterance.audio.name} by {utterance.speaker or '(none given)'}",
            )
    return chosen


# --- CHAT ---


def _read_chat(
    file: Path, path: Path, speaker: str | None, files: _Files, report: DataReport
) -> Iterator[Utterance]:
    transcript = read_transcript(file, speaker, report)
    audio = _media(file, transcript.media, files)
    split = _split_of_folders(file.relative_to(path).parts[:-1]) if path.is_dir() else None
    for said in transcript.utterances:
        chosen = split or _split_of_text(said.text)
        yield Utterance(audio, said.text, chosen, said.start_s, said.end_s, transcript.speaker)


def _media(file: Path, name: str, files: _Files) -> Path:
    """The recording that @Media names, beside the transcript or in media/."""
    suffixes = ("",) if name.lower().endswith(MEDIA_SUFFIXES) else MEDIA_SUFFIXES
    for folder in (file.parent, file.parent / "media"):
        for suffix in suffixes:
            found = files.find(folder, f"{name}{suffix}") or files.find(
                folder, f"{name}{suffix.upper()}"
            )
            if found:
                return found
    raise DataError(
        f"{file}: audio {name!r} of its @Media header does not exist; "
        f"put {name} ({', '.join(MEDIA_SUFFIXES)}) beside it or in media/."
    )
