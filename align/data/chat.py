"""CHAT transcripts (TalkBank's .cha): what one speaker said, and when, without the codes.

After MacWhinney, "Tools for Analyzing Talk, Part 1: The CHAT Transcription Format", and TalkBank's table of characters
for conversation analysis. A text holds the words that the recording holds: repeated, corrected and abandoned words
stay, as often as they were said. Hesitations (&-um), fragments (&+fr), events and pauses are no words and go; a word
that is no word ("wog [: dog]") becomes the one that was meant. Nothing here reads audio.
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
_BULLET = re.compile(
    r'\x15-?(?:%\w+:"[^"]*"_)?(\d+)_(\d+)-?\x15'
)  # start_end in ms between NAKs; the older form too
_LINKER = re.compile(
    r'\+["/.,!?^<+~≈≋]+'
)  # +... +/. +"/. and their like, and what opens an utterance: +< +" ++
_OVERLAP = re.compile(r"[⌈⌉⌊⌋]\d?")  # with the number of the overlap, where there are several
_STUTTER = re.compile(
    r"↫[^↫\s]*↫"
)  # a part of a word said several times before the whole: ↫b-b↫ball
_TOKEN = re.compile(r"\[[^\]]*\]|[<>]|[^\s\[\]<>]+")
_REPEATED = re.compile(r"\[x\s?(\d{1,2})\]")  # how often what it follows was said
_REPLACEMENT = re.compile(
    r"\[:\s+(.+)\]"
)  # of a word that is none; [:: ...] is what a real word should have been
_NOT_SAID = re.compile(
    r"[&#].*|0(?!\.?\d).*|\([\d.:]+\)|[.∙]?h{2,}"
)  # &-um &=laughs #, 0omitted, (.) (1.5), ∙hh
_JOINERS = str.maketrans("_+", "  ")  # ice+cream, Mary_Poppins
_FORM = re.compile(r"(?<=.)[@$].*")  # b@l, hola@s:spa, dog$n: what kind of word it is
_MARKS = str.maketrans(
    "", "", '():^ˈˌː„‡⁇⁎⁑§∙‹›〔〕“”"\u0332\u0305\u0331'
)  # restored letters, lengthening, voices
_YAWN_OR_ASPIRATION = str.maketrans("", "", "ΫἩ")  # letters in Greek only
_GREEK = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")
_HEARD = re.compile(r"\w|^[.,?!;]+$")  # a word, or what ends or divides an utterance
_SYMBOLS = ("Sm", "So", "Sk", "Co", "Cn")  # ↑ ∆ ° ☺ ♋ ▁ and their like
_UNINTELLIGIBLE = frozenset(("xxx", "yyy", "www"))
_UNKNOWN_TARGET = "x@n"  # AphasiaBank: a neologism whose target nobody knows


@dataclass(frozen=True)
class Said:
    """An utterance and its place in the recording."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Transcript:
    """What one speaker said; `media` is the recording as the @Media header names it."""

    media: str
    speaker: str
    utterances: list[Said]


def read_transcript(file: Path, speaker: str | None, report: DataReport) -> Transcript:
    """What `speaker` (None: PAR, or the only one) said; `report` counts what cannot be used.

    Raises:
        DataError: unreadable, no such speaker, or no @Media header.
    """
    lines = (
        read_text(file).replace("\n\t", " ").split("\n")
    )  # a line that starts with a tab continues the last
    code, media = _code(file, lines, speaker), _media(file, lines)
    return Transcript(media, code, list(_utterances(file, lines, code, report)))


def _utterances(file: Path, lines: list[str], code: str, report: DataReport) -> Iterator[Said]:
    for tier in filter(None, map(_TIER.match, lines)):
        example = f"{file.name}: *{tier[1]}: {_BULLET.sub('', tier[2]).strip()[:60]}"
        if tier[1] != code:
            report.leave_out("by another speaker", example)
            continue
        marks, text = _BULLET.findall(tier[2]), clean_chat(_BULLET.sub(" ", tier[2]))
        if reason := _reason_to_leave_out(marks, text):
            report.leave_out(reason, example)
        else:
            yield Said(text, int(marks[0][0]) / 1000, int(marks[-1][1]) / 1000)


def _reason_to_leave_out(marks: list[tuple[str, str]], text: str) -> str | None:
    words = re.findall(r"\w+", text)
    if not marks:
        return "without time marks"
    if int(marks[-1][1]) <= int(marks[0][0]):
        return "with a time mark that ends before it begins"
    if not words:
        return "without words"
    return None if _UNINTELLIGIBLE.isdisjoint(words) else "unintelligible"


def _header(lines: list[str], name: str) -> list[str]:
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(f"@{name}:")]


def _codes(lines: list[str]) -> list[str]:
    """Every speaker that a header declares or a tier belongs to."""
    people = [
        person.split() for line in _header(lines, "Participants") for person in line.split(",")
    ]
    fields = [line.split("|") for line in _header(lines, "ID")]  # language|corpus|code|...
    tiers = filter(None, map(_TIER.match, lines))
    declared = [person[0] for person in people if person] + [
        field[2] for field in fields if len(field) > 2
    ]
    return list(dict.fromkeys(declared + [tier[1] for tier in tiers]))


def _code(file: Path, lines: list[str], speaker: str | None) -> str:
    """Whose utterances to take: the one asked for, PAR, or the only speaker."""
    codes = _codes(lines)
    there = ", ".join(codes) or "none"
    if speaker is not None and speaker not in codes:
        raise DataError(f"{file}: no speaker {speaker!r}; its speakers are: {there}.")
    if speaker is None and "PAR" not in codes and len(codes) != 1:
        raise DataError(
            f"{file}: which speaker? It has no PAR; give the code of one of its speakers: {there}."
        )
    return speaker or ("PAR" if "PAR" in codes else codes[0])


def _media(file: Path, lines: list[str]) -> str:
    headers = _header(lines, "Media")
    if not headers:
        raise DataError(
            f"{file}: no @Media header; add '@Media:\t{file.stem}, audio' to name its recording."
        )
    return headers[0].split(",")[0].strip().strip('"')


def clean_chat(text: str) -> str:
    """The words that were said, without CHAT's codes: 'the [/] the wog [: dog] [x 2] (be)cause .'
    -> 'the the dog dog because.'

    Time marks are not expected; unintelligible speech stays as xxx, yyy or www.
    """
    text = _STUTTER.sub("", _OVERLAP.sub("", _LINKER.sub(" ", text)))
    words = " ".join(filter(None, map(_clean_word, _resolve(text))))
    words = re.sub(r"\s+(?=[.,?!;])", "", unicodedata.normalize("NFC", " ".join(words.split())))
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
    """Repeat or replace the last item; every other code (retraced, excluded, overlapped, explained) changes no word."""
    repeated, replacement = _REPEATED.fullmatch(code), _REPLACEMENT.fullmatch(code)
    if items and repeated:
        items[-1] = items[-1] * max(1, int(repeated[1]))
    elif items and replacement:
        items[-1] = ["xxx"] if replacement[1] == _UNKNOWN_TARGET else replacement[1].split()


def _clean_word(word: str) -> str:
    if _NOT_SAID.fullmatch(word):
        return ""
    word = _FORM.sub("", word).translate(_JOINERS).translate(_MARKS)
    if not _GREEK.search(word.translate(_YAWN_OR_ASPIRATION)):
        word = word.translate(_YAWN_OR_ASPIRATION)
    word = "".join(c for c in word if unicodedata.category(c) not in _SYMBOLS)
    return word if _HEARD.search(word) else ""
