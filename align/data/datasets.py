"""Load a data set: recordings with their transcripts, in the forms in which they usually come.

Recognised are a table (CSV, tab-separated text, JSON lines or a JSON array) that names recordings
and texts, by itself, as a folder's metadata file, as one file for each split or in each split's
folder (Hugging Face's "audiofolder", NeMo's manifests, Common Voice); and CHAT transcripts
(TalkBank's .cha) beside their media. What a row means is in metadata.py, what a transcript means in
chat.py. This reads no audio until `Utterance.load`, downloads nothing and neither lower-cases nor
tokenizes.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tiny_align.align.data.chat import clean_chat, read_transcript
from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.file_finder import FileFinder
from tiny_align.align.data.metadata import read_table
from tiny_align.align.data.splits import (
    SPLITS,
    leave_out_unknown_splits,
    split_by_folders,
    split_by_name,
    split_by_text,
    split_of,
)
from tiny_align.align.data.tables import CSV_SUFFIXES, JSON_SUFFIXES
from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.errors import DataError

__all__ = [
    "SPLITS",
    "Utterance",
    "clean_chat",
    "leave_out_unknown_splits",
    "load_dataset",
    "split_of",
]

log = logging.getLogger(__name__)

FORMS = (
    "a folder with metadata.jsonl or metadata.csv (file_name, transcription), "
    "a .jsonl manifest (audio_filepath, text), or CHAT transcripts (.cha) beside their audio"
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json")
TABLE_SUFFIXES = (*CSV_SUFFIXES, *JSON_SUFFIXES)  # NeMo calls its JSON lines .json
MEDIA_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


def load_dataset(
    path: Path | str, speaker: str | None = None, report: DataReport | None = None
) -> list[Utterance]:
    """The utterances of a data set, in the order of its files.

    Args:
        path: one of FORMS.
        speaker: only this one; for CHAT a speaker's code, by default PAR or the only one there is.
        report: counts what is left out; None: it is logged.

    Raises:
        DataError: nothing there, an unknown form, a bad row, missing audio, or no utterances.
    """
    path = Path(path)
    counts = report or DataReport()
    try:
        utterances = _load(path, speaker, counts)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read ({error.strerror}); "
            "give a path you have the right to read."
        ) from error
    if not utterances:
        explanation = counts.explained() or "it holds no row"
        raise DataError(
            f"{path}: no utterances; expected at least one recording with its text ({explanation})."
        )
    if report is None and counts.left_out:
        log.warning("%s: %s", path, counts.explained())
    return utterances


def _load(path: Path, speaker: str | None, report: DataReport) -> list[Utterance]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {FORMS}.")
    finder = FileFinder()
    utterances: list[Utterance] = []
    tables = _find_tables(path)
    if tables:
        for table, split in tables:
            utterances.extend(read_table(table, split, finder))
        return _only_speaker(utterances, speaker, path, report)
    transcripts = _find_transcripts(path)
    if transcripts:
        for file in transcripts:
            utterances.extend(_read_chat(file, path, speaker, finder, report))
        return utterances
    raise DataError(f"{path}: {_describe_unknown(path)}; expected {FORMS}.")


# --- which files ---


def _find_tables(path: Path) -> Sequence[tuple[Path, str | None]]:
    """The tables of a data set, each with the split of its own or its folder's name."""
    if not path.is_dir():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            return []
        split = split_by_name(path.stem)
        # A training table alone has no split: a part of its texts becomes the test split.
        return [(path, None if split == "train" else split)]

    metadata = [path / name for name in METADATA_FILES if (path / name).exists()]
    if metadata:
        _refuse_twins(metadata)
        return [(metadata[0], None)]

    named = []
    ignored = []
    for file in _tables_in(path):
        split = split_by_name(file.stem)
        if split:
            named.append((file, split))
        else:
            ignored.append(file.name)
    if named:
        if ignored:
            log.warning("%s: not read, as its name is no split's: %s", path, ", ".join(ignored))
        _refuse_twins([file for file, _ in named])
        return named

    nested: list[Path] = []
    for pattern in ("*", "*/*"):
        for name in METADATA_FILES:
            nested.extend(path.glob(f"{pattern}/{name}"))
    nested.sort()
    _refuse_twins(nested)
    return [(file, split_by_folders(file.relative_to(path).parts[:-1])) for file in nested]


def _tables_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES)


def _refuse_twins(files: list[Path]) -> None:
    """Raise a DataError if two files differ in their suffix only: either may be meant."""
    for one, other in zip(files, files[1:]):
        if one.with_suffix("") == other.with_suffix(""):
            raise DataError(
                f"{one.parent}: holds both {one.name} and {other.name}; "
                "expected one of them, remove the other or give the file itself."
            )


def _find_transcripts(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".cha" else []
    found = []
    for file in path.rglob("*"):
        companion = file.name.startswith("._")  # macOS puts such files beside others
        if file.suffix.lower() == ".cha" and not companion:
            found.append(file)
    return sorted(found)


def _describe_unknown(path: Path) -> str:
    """What is there instead of a data set."""
    if not path.is_dir():
        return "a file of no known form"
    tables = [file.name for file in _tables_in(path)]
    hint = f" (give {' or '.join(tables[:3])} itself, if it is one)" if tables else ""
    return f"a folder of no known form{hint}"


# --- tables ---


def _only_speaker(
    utterances: list[Utterance], speaker: str | None, path: Path, report: DataReport
) -> list[Utterance]:
    """The utterances of one speaker (None: of all); the others are left out."""
    if speaker is None:
        return utterances
    chosen = [utterance for utterance in utterances if utterance.speaker == speaker]
    others = [utterance for utterance in utterances if utterance.speaker != speaker]
    if not chosen:
        known = ", ".join(sorted({_speaker_name(utterance) for utterance in others}))
        raise DataError(f"{path}: nothing by speaker {speaker!r}; its speakers are: {known}.")
    for utterance in others:
        example = f"{utterance.audio.name} by {_speaker_name(utterance)}"
        report.leave_out("by another speaker", example)
    return chosen


def _speaker_name(utterance: Utterance) -> str:
    return utterance.speaker or "(none given)"


# --- CHAT ---


def _read_chat(
    file: Path, path: Path, speaker: str | None, finder: FileFinder, report: DataReport
) -> Iterator[Utterance]:
    """The utterances of a transcript in the data set `path`."""
    transcript = read_transcript(file, speaker, report)
    audio = _find_media(file, transcript.media, finder)
    folders = file.relative_to(path).parts[:-1] if path.is_dir() else ()
    folder_split = split_by_folders(folders)
    for entry in transcript.utterances:
        split = folder_split or split_by_text(entry.text)
        yield Utterance(audio, entry.text, split, entry.start_s, entry.end_s, transcript.speaker)


def _find_media(file: Path, name: str, finder: FileFinder) -> Path:
    """The recording that @Media names, beside the transcript or in media/."""
    suffixes = ("",) if name.lower().endswith(MEDIA_SUFFIXES) else MEDIA_SUFFIXES
    for folder in (file.parent, file.parent / "media"):
        for suffix in suffixes:
            media = finder.find(folder, name + suffix)
            media = media or finder.find(folder, name + suffix.upper())
            if media:
                return media
    raise DataError(
        f"{file}: audio {name!r} of its @Media header does not exist; "
        f"put {name} ({', '.join(MEDIA_SUFFIXES)}) beside it or in media/."
    )
