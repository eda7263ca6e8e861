"""A person's recordings with what they said, from the forms people already have.

Three forms are recognised: a folder with metadata.jsonl or metadata.csv (Hugging Face's "audiofolder"), a
JSON-lines manifest (NeMo's), and CHAT transcripts (TalkBank's .cha, one or a folder of them) beside their media.
Texts are NFC and otherwise as transcribed; CHAT is reduced to what the speaker meant to say. This reads no
audio until `Utterance.load`, downloads nothing and neither lower-cases nor tokenizes.
"""

import csv
import io
import json
import logging
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

import numpy as np

from tiny_align.runtime.audio import read_audio, read_segment
from tiny_align.runtime.errors import DataError

log = logging.getLogger(__name__)

FORMS = (
    "a folder with metadata.jsonl or metadata.csv (file_name, transcription), "
    "a .jsonl manifest (audio_filepath, text), or CHAT transcripts (.cha) beside their audio"
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
MANIFEST_SUFFIXES = (".jsonl", ".json")  # NeMo calls its JSON lines .json
MEDIA_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
SPLIT_FOLDERS = ("train", "test")
TEST_ONE_IN = 5


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
        """(S,) float32 at `sample_rate`; raises AudioError, as runtime/audio.py does."""
        if self.start_s is None and self.end_s is None:
            return read_audio(self.audio, sample_rate)
        return read_segment(self.audio, sample_rate, self.start_s or 0.0, self.end_s)


def load_dataset(path: Path | str, speaker: str | None = None) -> list[Utterance]:
    """The utterances of a data set, in the order of its files.

    Args:
        path: one of FORMS.
        speaker: only this person; for CHAT a speaker's code, by default PAR or the only one there is.

    Raises:
        DataError: nothing there, an unknown form, a bad row, audio that is missing, or no utterances.
    """
    path = Path(path)
    transcripts = _transcripts(path)
    if transcripts:
        utterances = _read_transcripts(transcripts, speaker)
    else:
        utterances = _of_speaker(list(_read_table(_table(path))), speaker, path)
    if not utterances:
        raise DataError(
            f"{path}: no utterances; expected at least one recording with its text (the log says what was skipped)."
        )
    return utterances


def split_of(utterances: Iterable[Utterance], name: str) -> list[Utterance]:
    """The utterances of one split, or a DataError that lists the splits there are."""
    utterances = list(utterances)
    chosen = [utterance for utterance in utterances if utterance.split == name]
    if not chosen:
        counts = Counter(utterance.split for utterance in utterances)
        there = ", ".join(f"{split} ({count})" for split, count in sorted(counts.items())) or "none"
        raise DataError(f"no utterances in split {name!r}, expected one of: {there}; set `split` in the data set.")
    return chosen


def _transcripts(path: Path) -> list[Path]:
    """The CHAT files at `path`; none when it is of another form."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {FORMS}.")
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".cha" else []
    if any((path / name).is_file() for name in METADATA_FILES):
        return []
    return sorted(file for file in path.iterdir() if file.suffix.lower() == ".cha")


def _table(path: Path) -> Path:
    """The file with the rows: the manifest itself or a folder's metadata."""
    if path.is_dir():
        found = [path / name for name in METADATA_FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: a folder of no known form; expected {FORMS}.")
        return found[0]
    if path.name not in METADATA_FILES and path.suffix.lower() not in MANIFEST_SUFFIXES:
        raise DataError(f"{path}: a file of no known form; expected {FORMS}.")
    return path


# --- rows: metadata and manifests ---


@dataclass(frozen=True)
class _Fields:
    """What a form calls its columns."""

    audio: str
    texts: tuple[str, ...]  # the first one present is taken
    timed: bool  # offset and duration choose a part of the file


_METADATA = _Fields("file_name", ("transcription", "text", "sentence"), timed=False)
_MANIFEST = _Fields("audio_filepath", ("text",), timed=True)


def _read_table(file: Path) -> Iterator[Utterance]:
    fields = _METADATA if file.name in METADATA_FILES else _MANIFEST
    rows = _csv_rows if file.suffix == ".csv" else _json_rows
    for line, row in rows(file):
        yield _utterance(row, f"{file}, line {line}", file.parent, fields)


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {line}: invalid JSON ({error}); expected one object per line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {line}: got a {type(row).__name__}; expected one JSON object per line.")
        yield line, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_read_text(file)), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num + 1}: invalid CSV ({error}); correct it.") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (at byte {error.start}); save it as UTF-8.") from error


def _utterance(row: dict, where: str, folder: Path, fields: _Fields) -> Utterance:
    name = _field(row, (fields.audio,), where)
    text = _tidy(_field(row, fields.texts, where))
    audio = folder / name
    if not audio.is_file():
        raise DataError(f"{where}: audio file {audio} does not exist; put it there or correct {fields.audio}.")
    start_s, end_s = _times(row, where) if fields.timed else (None, None)
    speaker = row.get("speaker") or row.get("speaker_id")
    return Utterance(audio, text, _split(row, name, text), start_s, end_s, speaker and str(speaker))


def _field(row: dict, names: tuple[str, ...], where: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str) or not value.strip():
        wanted, there = " or ".join(names), ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{where}: no text in the field {wanted}; the row has {there}. Add it or remove the row.")
    return value


def _tidy(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _times(row: dict, where: str) -> tuple[float | None, float | None]:
    """Start and end in seconds from a manifest's offset and duration."""
    offset, duration = (_seconds(row, name, where) for name in ("offset", "duration"))
    if duration == 0:
        raise DataError(f"{where}: duration is 0; expected seconds above 0, correct it or remove the row.")
    return offset, None if duration is None else (offset or 0.0) + duration


def _seconds(row: dict, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise DataError(f"{where}: {name} is {value!r}; expected seconds, a number from 0 up.")
    return float(value)


def _split(row: dict, name: str, text: str) -> str:
    """What the row says, or the train/ or test/ folder its audio is in, or a matter of its text."""
    if row.get("split"):
        return str(row["split"])
    folder = PurePath(name).parts[0]
    return folder if folder in SPLIT_FOLDERS else _split_of_text(text)


def _split_of_text(text: str) -> str:
    """Always the same for the same sentence: a repetition of it never lands in the other split."""
    return "train" if zlib.crc32(text.casefold().encode(errors="replace")) % TEST_ONE_IN else "test"


def _of_speaker(utterances: list[Utterance], speaker: str | None, path: Path) -> list[Utterance]:
    if speaker is None:
        return utterances
    chosen = [utterance for utterance in utterances if utterance.speaker == speaker]
    if not chosen:
        there = ", ".join(sorted({utterance.speaker or "(none given)" for utterance in utterances}))
        raise DataError(f"{path}: nothing by speaker {speaker!r}; its speakers are: {there}.")
    return chosen


# --- CHAT: MacWhinney, "Tools for Analyzing Talk, Part 1: The CHAT Transcription Format" ---

_TIER = re.compile(r"\*([^:\s]+):\s*(.*)")
_BULLET = re.compile(r'\x15-?(?:%\w+:"[^"]*"_)?(\d+)_(\d+)-?\x15')  # start_end in ms between NAKs; the older form too
_LINKER = re.compile(r'\+["/.,!?^<+~≈]+')  # +... +/. +"/. and their like, and what opens an utterance: +< +" ++
_TOKEN = re.compile(r"\[[^\]]*\]|[<>]|[^\s\[\]<>]+")
_RETRACED = re.compile(r"\[(/|//|///|/-|/\?|e)\]")  # what it follows was said again, or is not to count
_REPLACEMENT = re.compile(r"\[::?\s+(.+)\]")
_NOT_SAID = re.compile(r"[&#].*|0(?!\.?\d).*|\([\d.:]+\)")  # &-um &+fr &=laughs #, 0omitted, pauses (.) (1.5)
_JOINERS = str.maketrans("_+", "  ")  # ice+cream, Mary_Poppins
_MARKS = str.maketrans("", "", "():^ˈˌ≠„‡⌈⌉⌊⌋↑↓→↗↘⇗⇘∆∇°‹›〔〕")  # restored letters, lengthening, stress, overlap
_UNINTELLIGIBLE = frozenset(("xxx", "yyy", "www"))
_UNKNOWN_TARGET = "x@n"  # AphasiaBank: a neologism whose target nobody knows


def _read_transcripts(files: list[Path], speaker: str | None) -> list[Utterance]:
    skipped: Counter[str] = Counter()
    utterances = [utterance for file in files for utterance in _read_transcript(file, speaker, skipped)]
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        log.warning("%s: skipped %d utterances: %s", files[0].parent, skipped.total(), reasons)
    return utterances


def _read_transcript(file: Path, speaker: str | None, skipped: Counter) -> Iterator[Utterance]:
    lines = _read_text(file).replace("\n\t", " ").split("\n")  # a line that starts with a tab continues the last
    code, audio = _code(file, lines, speaker), _media(file, lines)
    for tier in filter(None, map(_TIER.match, lines)):
        if tier[1] != code:
            continue
        times, text = _chat_times(tier[2]), clean_chat(_BULLET.sub(" ", tier[2]))
        reason = _reason_to_skip(times, text)
        if reason:
            skipped[reason] += 1
        else:
            yield Utterance(audio, text, _split_of_text(text), *times, code)


def _reason_to_skip(times: tuple[float, float] | None, text: str) -> str | None:
    words = re.findall(r"\w+", text)
    if times is None:
        return "without time marks"
    if not words:
        return "without words"
    return None if _UNINTELLIGIBLE.isdisjoint(words) else "unintelligible"


def _chat_times(tier: str) -> tuple[float, float] | None:
    """Seconds from the first time mark's start to the last one's end."""
    marks = _BULLET.findall(tier)
    if not marks or int(marks[-1][1]) <= int(marks[0][0]):
        return None
    return int(marks[0][0]) / 1000, int(marks[-1][1]) / 1000


def _header(lines: list[str], name: str) -> list[str]:
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(f"@{name}:")]


def _codes(lines: list[str]) -> list[str]:
    """Every speaker that a header declares or a tier belongs to."""
    people = [person.split() for line in _header(lines, "Participants") for person in line.split(",")]
    fields = [line.split("|") for line in _header(lines, "ID")]  # language|corpus|code|...
    tiers = filter(None, map(_TIER.match, lines))
    declared = [person[0] for person in people if person] + [field[2] for field in fields if len(field) > 2]
    return list(dict.fromkeys(declared + [tier[1] for tier in tiers]))


def _code(file: Path, lines: list[str], speaker: str | None) -> str:
    """Whose utterances to take: the one asked for, PAR, or the only speaker."""
    codes = _codes(lines)
    there = ", ".join(codes) or "none"
    if speaker is not None and speaker not in codes:
        raise DataError(f"{file}: no speaker {speaker!r}; its speakers are: {there}.")
    if speaker is None and "PAR" not in codes and len(codes) != 1:
        raise DataError(f"{file}: which speaker? It has no PAR; give the code of one of its speakers: {there}.")
    return speaker or ("PAR" if "PAR" in codes else codes[0])


def _media(file: Path, lines: list[str]) -> Path:
    """The audio that @Media names, beside the transcript or in media/."""
    headers = _header(lines, "Media")
    if not headers:
        raise DataError(f"{file}: no @Media header; add '@Media:\t{file.stem}, audio' to name its recording.")
    name = headers[0].split(",")[0].strip().strip('"')
    suffixes = ("",) if name.lower().endswith(MEDIA_SUFFIXES) else MEDIA_SUFFIXES
    for folder in (file.parent, file.parent / "media"):
        for suffix in suffixes:
            for candidate in (folder / f"{name}{suffix}", folder / f"{name}{suffix.upper()}"):
                if candidate.is_file():
                    return candidate
    raise DataError(
        f"{file}: audio {name!r} of its @Media header does not exist; "
        f"put {name} ({', '.join(MEDIA_SUFFIXES)}) beside it or in media/."
    )


def clean_chat(text: str) -> str:
    """What the speaker meant to say, without CHAT's codes: 'the [/] the wog [: dog] (be)cause .' -> 'the dog because.'

    Retraced words, fillers, events, pauses and omitted words go; replacements and omitted sounds come in. Time
    marks are not expected; unintelligible speech stays as xxx, yyy or www.
    """
    words = " ".join(filter(None, map(_clean_word, _resolve(_LINKER.sub(" ", text)))))
    words = re.sub(r"\s+(?=[.,?!;])", "", _tidy(words))
    return re.sub(r",+(?=[.,?!;])", "", words).lstrip(" ,;")


def _resolve(text: str) -> list[str]:
    """The words left when the codes in brackets have been applied to the word or <group> before them."""
    stack: list[list[list[str]]] = [[]]  # open groups; each holds items, each item its words
    for token in _TOKEN.findall(text):
        if token == "<":
            stack.append([])
        elif token == ">":
            _close(stack)
        elif token.startswith("["):
            _apply(token, stack[-1])
        else:
            stack[-1].append([token])
    while len(stack) > 1:  # a group that was never closed
        _close(stack)
    return list(chain.from_iterable(stack[0]))


def _close(stack: list[list[list[str]]]) -> None:
    """The innermost group becomes one item of the group around it."""
    if len(stack) > 1:
        group = stack.pop()
        stack[-1].append(list(chain.from_iterable(group)))


def _apply(code: str, items: list[list[str]]) -> None:
    replacement = _REPLACEMENT.fullmatch(code)
    if items and _RETRACED.fullmatch(code):
        items.pop()
    elif items and replacement:
        items[-1] = ["xxx"] if replacement[1] == _UNKNOWN_TARGET else replacement[1].split()


def _clean_word(word: str) -> str:
    if _NOT_SAID.fullmatch(word):
        return ""
    return word.split("@")[0].translate(_MARKS).translate(_JOINERS)
