"""Word and character error rates as the field counts them: after the same normaliser on both sides.

The normaliser is Whisper's English one (package whisper-normalizer): case, punctuation, spelling, contractions and
numbers count for nothing. Numbers are compared digit by digit, so that "six five", "6 5" and "65" agree and one digit
that is misheard is one error. Texts in other languages only lose case, punctuation and accents.
"""

import re
from functools import cache
from importlib.metadata import version

_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?=\d)")
_APOSTROPHES = str.maketrans("’‘ʼ", "'''")


def normaliser_name() -> str:
    """What error rates were counted with, for the JSON document."""
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
    """(WER, CER) over all pairs of texts: errors by the length of all references together.

    An empty hypothesis is all words wrong; words heard where the reference has none are errors too.
    """
    from rapidfuzz.distance import Levenshtein

    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    words = [(reference.split(), hypothesis.split()) for reference, hypothesis in pairs]
    return _rate(words, Levenshtein.distance), _rate(pairs, Levenshtein.distance)


def _rate(pairs: list[tuple], distance) -> float:
    errors = sum(distance(reference, hypothesis) for reference, hypothesis in pairs)
    return errors / max(1, sum(len(reference) for reference, _ in pairs))


@cache
def _normalisers():
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer(), BasicTextNormalizer()
