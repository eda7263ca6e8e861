"""Which split an utterance belongs to.

A row's own split comes first, then a folder's or file's name; without any of these, the text
decides.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.errors import DataError

SPLITS = {  # split -> its usual names
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
TEST_ONE_IN = 5  # of the texts without a split


def split_by_name(name: str) -> str | None:
    """The split of a usual name, alone or as first word: train, Training, dev-clean, test.other."""
    first_word = re.split(r"[-._ \d]", name.strip().casefold(), maxsplit=1)[0]
    for split, names in SPLITS.items():
        if first_word in names:
            return split
    return None


def split_by_folders(folders: Iterable[str]) -> str | None:
    """The split of the innermost folder that is named after one; `folders` from outside in."""
    for folder in reversed(list(folders)):
        split = split_by_name(folder)
        if split:
            return split
    return None


def split_by_text(text: str) -> str:
    """'train' or 'test', the same for the same sentence: its repetitions stay together."""
    checksum = zlib.crc32(text.casefold().encode(errors="replace"))
    return "train" if checksum % TEST_ONE_IN else "test"


def split_of(utterances: Iterable[Utterance], name: str) -> list[Utterance]:
    """The utterances of one split, given by any of its names.

    Raises:
        DataError: none; the message lists the splits that there are.
    """
    utterances = list(utterances)
    split = split_by_name(name) or name
    chosen = [utterance for utterance in utterances if utterance.split == split]
    if not chosen:
        counts = Counter(utterance.split for utterance in utterances)
        known = ", ".join(f"{split} ({n})" for split, n in sorted(counts.items())) or "none"
        raise DataError(
            f"no utterances in split {name!r}, expected one of: {known}; "
            "set `split` in the data set."
        )
    return chosen


def leave_out_unknown_splits(utterances: Iterable[Utterance], report: DataReport) -> None:
    """Count the utterances of splits that no training uses."""
    for utterance in utterances:
        if utterance.split not in SPLITS:
            reason = f"of split {utterance.split!r}, none of {', '.join(SPLITS)}"
            report.leave_out(reason, utterance.audio.name)
