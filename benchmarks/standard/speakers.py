"""Recorded speakers on this machine: the folders that `--digits` of several programs takes."""

from pathlib import Path

from tiny_align.runtime.bundle.shipped import shipped


def speakers_of(digits: Path | None) -> dict[str, Path]:
    """Name and folder of each speaker with a metadata.jsonl; none without `digits`."""
    speakers = {}
    if digits:
        for path in sorted(digits.glob("*/metadata.jsonl")):
            speakers[path.parent.name] = path.parent
    return speakers


def data_folders(digits: Path | None) -> list[Path]:
    """The shipped recordings and every folder of `digits`, each of them a data set."""
    folders = [shipped("voice")]
    if digits:
        folders += sorted(path for path in digits.iterdir() if path.is_dir())
    return folders
