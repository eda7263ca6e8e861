"""Which sentences a new person should read: those that cover the language soonest.

What is to be covered are the LLM's tokens and, in place of sounds, three letters in a row within a word. A unit
counts in full the first time, half the second, a third the third: rare ones come first, common ones still come often.
"""

from collections import Counter
from collections.abc import Callable


def units(text: str, encode: Callable[[str], list[int]]) -> set:
    """The tokens of a sentence and its letter triples; a word's edges count as letters."""
    words = [f" {word} " for word in text.split()]
    return set(encode(text)) | {word[i : i + 3] for word in words for i in range(len(word) - 2)}


def choose(candidates: list[str], n: int, encode: Callable[[str], list[int]]) -> list[str]:
    """The `n` sentences that cover the candidates' units soonest, in that order (greedy; ties: the first)."""
    left = {text: units(text, encode) for text in candidates}
    covered, chosen = Counter(), []
    while left and len(chosen) < n:
        best = max(left, key=lambda text: sum(1 / (1 + covered[unit]) for unit in left[text]))
        covered.update(left.pop(best))
        chosen.append(best)
    return chosen


def coverage(chosen: list[str], candidates: list[str], encode: Callable[[str], list[int]]) -> float:
    """Share of the candidates' units that the chosen sentences hold."""
    said = set().union(*(units(text, encode) for text in chosen))
    there = set().union(*(units(text, encode) for text in candidates))
    return len(said & there) / len(there)
