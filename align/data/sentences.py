"""Which sentences a new user should read: those that cover the language soonest.

A sentence covers *units*: the LLM's tokens and, in place of sounds, three letters in a row within a
word. A unit counts in full the first time, half the second, a third the third: rare units come
first, common ones still come often.
"""

from collections import Counter
from collections.abc import Callable

Encode = Callable[[str], list[int]]  # text -> token ids


def units(text: str, encode: Encode) -> set[int | str]:
    """The tokens of a sentence and its letter triples; a word's edges count as letters."""
    found: set[int | str] = set(encode(text))
    for word in text.split():
        padded = f" {word} "
        for i in range(len(padded) - 2):
            found.add(padded[i : i + 3])
    return found


def choose(candidates: list[str], n: int, encode: Encode) -> list[str]:
    """The `n` sentences that cover the candidates' units soonest (greedy; ties: the first)."""
    remaining = {text: units(text, encode) for text in candidates}
    covered: Counter[int | str] = Counter()
    chosen: list[str] = []

    def gain(text: str) -> float:
        return sum(1 / (1 + covered[unit]) for unit in remaining[text])

    while remaining and len(chosen) < n:
        next_text = max(remaining, key=gain)
        covered.update(remaining.pop(next_text))
        chosen.append(next_text)
    return chosen


def coverage(chosen: list[str], candidates: list[str], encode: Encode) -> float:
    """Share of the candidates' units that the chosen sentences contain."""
    wanted = _all_units(candidates, encode)
    covered = _all_units(chosen, encode)
    return len(covered & wanted) / len(wanted)


def _all_units(texts: list[str], encode: Encode) -> set[int | str]:
    found = set()
    for text in texts:
        found |= units(text, encode)
    return found
