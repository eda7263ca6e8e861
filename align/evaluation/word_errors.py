"""Word and character error rates as the field counts them: after the same normaliser on both sides.

The normaliser is Whisper's English one (package whisper-normalizer): case, punctuation, spelling,
contractions and numbers make no difference. Numbers are compared digit by digit: "six five", "6 5"
and "65" agree, and one wrong digit is one error. Texts in other languages only lose case,
punctuation and accents.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version

_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?=\d)")
_APOSTROPHES = str.maketrans("’‘ʼ", "'''")


def normaliser_name() -> str:
    """The normaliser and its version, for the JSON document."""
    return f"whisper-normalizer {version('whisper-normalizer')}, English, numbers digit by digit"


def normalise(text: str) -> str:
    """'Mr. Smith's twenty-one colours.' -> 'mister smith is 2 1 colors'"""
    text = text.translate(_APOSTROPHES)
    english, basic = _normalisers()
    try:
        words = english(text)
    except (AssertionError, ValueError):  # a number of more than 4,300 digits
        words = basic(text)
    words = re.sub(r"\bone\b", "1", words)  # Whisper writes a single 1 as a word
    return " ".join(_BETWEEN_DIGITS.sub(" ", words).split())


def error_rates(references: list[str], hypotheses: list[str]) -> tuple[float, float]:
    """(WER, CER) over all pairs of texts: errors over the length of all references together.

    If a hypothesis is empty, all its words are wrong; words are errors too where the reference has
    none.
    """
    words = []
    characters = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        reference = normalise(reference)
        hypothesis = normalise(hypothesis)
        words.append((reference.split(), hypothesis.split()))
        characters.append((reference, hypothesis))
    return _error_rate(words), _error_rate(characters)


def _error_rate(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    from rapidfuzz.distance import Levenshtein

    errors = 0
    length = 0
    for reference, hypothesis in pairs:
        errors += Levenshtein.distance(reference, hypothesis)
        length += len(reference)
    return errors / max(1, length)


@cache
def _normalisers() -> tuple[Callable[[str], str], Callable[[str], str]]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer(), BasicTextNormalizer()
