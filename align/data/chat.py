"""CHAT transcripts (TalkBank's .cha): one speaker's utterances with their time marks, no codes.

After MacWhinney, "Tools for Analyzing Talk, Part 1: The CHAT Transcription Format", and TalkBank's
table of characters for conversation analysis. A text has the words of the recording: repeated,
corrected and abandoned words stay, as often as they were spoken. Hesitations (&-um), fragments
(&+fr), events and pauses are no words and are removed; a non-word ("wog [: dog]") becomes the word
that was meant. Nothing here reads audio.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.tables import read_text
from tiny_align.runtime.errors import DataError

_TIER = re.compile(r"\*([^:\s]+):\s*(.*)")
# A time mark: start_end in ms between two NAK characters; the older form with %snd:"..." too.
_TIME_MARK = re.compile(r'\x15-?(?:%\w+:"[^"]*"_)?(\d+)_(\d+)-?\x15')
# +... +/. +"/. and others, and what opens an utterance: +< +" ++
_LINKER = re.compile(r'\+["/.,!?^<+~≈≋]+')
_OVERLAP = re.compile(r"[⌈⌉⌊⌋]\d?")  # with the number of the overlap, where there are several
# A part of a word, repeated before the whole word: ↫b-b↫ball
_STUTTER = re.compile(r"↫[^↫\s]*↫")
_TOKEN = re.compile(r"\[[^\]]*\]|[<>]|[^\s\[\]<>]+")
_REPEATED = re.compile(r"\[x\s?(\d{1,2})\]")  # how often the item before it was spoken
# The word that was meant by a non-word; [:: ...] corrects a real word, which stays.
_REPLACEMENT = re.compile(r"\[:\s+(.+)\]")
# &-um &=laughs #, 0omitted, (.) (1.5), ∙hh
_NO_WORD = re.compile(r"[&#].*|0(?!\.?\d).*|\([\d.:]+\)|[.∙]?h{2,}")
_JOINERS = str.maketrans("_+", "  ")  # ice+cream, Mary_Poppins
_FORM = re.compile(r"(?<=.)[@$].*")  # b@l, hola@s:spa, dog$n: what kind of word it is
# Restored letters, lengthening, qualities of the voice.
_MARKS = str.maketrans("", "", '():^ˈˌː„‡⁇⁎⁑§∙‹›〔〕“”"\u0332\u0305\u0331')
_YAWN_OR_ASPIRATION = str.maketrans("", "", "ΫἩ")  # letters in Greek only
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")
_WORD_OR_PUNCTUATION = re.compile(r"\w|^[.,?!;]+$")
_SYMBOLS = ("Sm", "So", "Sk", "Co", "Cn")  # Unicode categories of ↑ ∆ ° ☺ ♋ ▁ and others
_UNINTELLIGIBLE = frozenset(("xxx", "yyy", "www"))
_UNKNOWN_TARGET = "x@n"  # AphasiaBank: a neologism whose target is not known


@dataclass(frozen=True)
class ChatUtterance:
    """An utterance and its place in the recording."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Transcript:
    """One speaker's utterances; `media` is the recording's name in the @Media header."""

    media: str
    speaker: str
    utterances: list[ChatUtterance]


def read_transcript(file: Path, speaker: str | None, report: DataReport) -> Transcript:
    """The utterances of `speaker` (None: PAR, or the only one).

    Args:
        report: counts what cannot be used.

    Raises:
        DataError: unreadable, no such speaker, or no @Media header.
    """
    text = read_text(file).replace("\n\t", " ")  # a line that starts with a tab continues the last
    lines = text.split("\n")
    code = _choose_speaker(file, lines, speaker)
    media = _headers(lines, "Media")
    if not media:
        raise DataError(
            f"{file}: no @Media header; add '@Media:\t{file.stem}, audio' to name its recording."
        )
    name = media[0].split(",")[0].strip().strip('"')
    return Transcript(name, code, list(_utterances(file, lines, code, report)))


def _choose_speaker(file: Path, lines: list[str], speaker: str | None) -> str:
    """The code of the speaker asked for, else PAR, else of the only speaker."""
    codes = _speaker_codes(lines)
    known = ", ".join(codes) or "none"
    if speaker is not None:
        if speaker not in codes:
            raise DataError(f"{file}: no speaker {speaker!r}; its speakers are: {known}.")
        return speaker
    if "PAR" in codes:
        return "PAR"
    if len(codes) != 1:
        raise DataError(
            f"{file}: which speaker? It has no PAR; give the code of one of its speakers: {known}."
        )
    return codes[0]


def _speaker_codes(lines: list[str]) -> list[str]:
    """The codes of all speakers that a header declares or a tier belongs to."""
    codes: dict[str, None] = {}  # a set in order
    for header in _headers(lines, "Participants"):  # "PAR Ana Participant, INV Investigator"
        for participant in header.split(","):
            codes.update(dict.fromkeys(participant.split()[:1]))
    for header in _headers(lines, "ID"):  # "language|corpus|code|..."
        codes.update(dict.fromkeys(header.split("|")[2:3]))
    for line in lines:
        if tier := _TIER.match(line):
            codes[tier[1]] = None
    return list(codes)


def _headers(lines: list[str], name: str) -> list[str]:
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(f"@{name}:")]


def _utterances(
    file: Path, lines: list[str], code: str, report: DataReport
) -> Iterator[ChatUtterance]:
    for line in lines:
        tier = _TIER.match(line)
        if not tier:
            continue
        speaker, content = tier[1], tier[2]
        example = f"{file.name}: *{speaker}: {_TIME_MARK.sub('', content).strip()[:60]}"
        if speaker != code:
            report.leave_out("by another speaker", example)
            continue
        marks = _TIME_MARK.findall(content)
        text = clean_chat(_TIME_MARK.sub(" ", content))
        reason = _reason_to_leave_out(marks, text)
        if reason:
            report.leave_out(reason, example)
            continue
        yield ChatUtterance(text, start_s=int(marks[0][0]) / 1000, end_s=int(marks[-1][1]) / 1000)


def _reason_to_leave_out(marks: list[tuple[str, str]], text: str) -> str | None:
    words = re.findall(r"\w+", text)
    if not marks:
        return "without time marks"
    if int(marks[-1][1]) <= int(marks[0][0]):
        return "with a time mark that ends before it begins"
    if not words:
        return "without words"
    return None if _UNINTELLIGIBLE.isdisjoint(words) else "unintelligible"


def clean_chat(text: str) -> str:
    """The words that were spoken, without CHAT's codes.

    'the [/] the wog [: dog] [x 2] (be)cause .' -> 'the the dog dog because.'

    Time marks are not expected; unintelligible speech stays as xxx, yyy or www.
    """
    text = _LINKER.sub(" ", text)
    text = _OVERLAP.sub("", text)
    text = _STUTTER.sub("", text)
    words = [_clean_word(word) for word in _apply_codes(text)]
    text = " ".join(" ".join(words).split())
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"\s+(?=[.,?!;])", "", text)
    return re.sub(r",+(?=[.,?!;])", "", text).lstrip(" ,;")


def _apply_codes(text: str) -> list[str]:
    """Apply each code in brackets to the word or <group> before it; returns the words left."""
    stack: list[list[list[str]]] = [[]]  # open groups; each holds items, each item its words
    for token in _TOKEN.findall(text):
        if token == "<":
            stack.append([])
        elif token == ">":
            _close_group(stack)
        elif token.startswith("["):
            _apply_code(token, stack[-1])
        else:
            stack[-1].append([token])
    while len(stack) > 1:  # a group that was never closed
        _close_group(stack)
    return list(chain.from_iterable(stack[0]))


def _close_group(stack: list[list[list[str]]]) -> None:
    """Turn the innermost group into one item of the group around it."""
    if len(stack) > 1:
        group = stack.pop()
        stack[-1].append(list(chain.from_iterable(group)))


def _apply_code(code: str, items: list[list[str]]) -> None:
    """Repeat or replace the last item.

    Every other code (retraced, excluded, overlapped, explained) changes no word.
    """
    repeated = _REPEATED.fullmatch(code)
    replacement = _REPLACEMENT.fullmatch(code)
    if items and repeated:
        items[-1] = items[-1] * max(1, int(repeated[1]))
    elif items and replacement:
        unknown = replacement[1] == _UNKNOWN_TARGET
        items[-1] = ["xxx"] if unknown else replacement[1].split()


def _clean_word(word: str) -> str:
    """A word without its marks; empty if it is no word."""
    if _NO_WORD.fullmatch(word):
        return ""
    word = _FORM.sub("", word).translate(_JOINERS).translate(_MARKS)
    latin = word.translate(_YAWN_OR_ASPIRATION)
    if not _GREEK.search(latin):
        word = latin
    word = "".join(c for c in word if unicodedata.category(c) not in _SYMBOLS)
    return word if _WORD_OR_PUNCTUATION.search(word) else ""
