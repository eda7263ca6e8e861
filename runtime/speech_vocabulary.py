"""The speech vocabulary: which of the LLM's tokens speech may produce, in training order.

`speech_tokens.npy` lists them, in the folder of a user whose projector knows words of its own, or
else in the bundle's; where neither has the file they are the whole vocabulary of the LLM. A
projector is trained with a token's place in the list, so that a longer list only adds to the end.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import read_array

SPEECH_TOKENS = "speech_tokens.npy"


@dataclass(frozen=True, eq=False)
class SpeechVocabulary:
    """The tokens that speech may produce, and how the LLM sees them."""

    tokens: np.ndarray  # (K,) int32 token ids, each once
    embed: Callable[[np.ndarray], np.ndarray]  # (K,) token ids -> (K, D) float32

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def table(self) -> np.ndarray:
        """(K, D) float32 embeddings, made on first use.

        They are in memory, where the table of the LLM's whole vocabulary need not be.
        """
        return self.embed(self.tokens)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {token: place for place, token in enumerate(self.tokens.tolist())}

    def places(self, tokens: Iterable[int]) -> list[int]:
        """The place of each token in the vocabulary.

        Raises:
            KeyError: a token that speech cannot produce.
        """
        return [self._places[token] for token in tokens]

    def extended(self, tokens: Iterable[int]) -> "SpeechVocabulary":
        """A vocabulary with the tokens that this one lacks at its end; no place changes."""
        every = dict.fromkeys([*self.tokens.tolist(), *tokens])
        if len(every) == len(self.tokens):
            return self
        return SpeechVocabulary(np.array(list(every), np.int32), self.embed)


def read_speech_tokens(folders: Iterable[Path], vocabulary: int) -> np.ndarray:
    """(K,) int32: the list in the first of these folders that has one, or else every token.

    Args:
        vocabulary: how many tokens the LLM has.
    Raises:
        BundleError: a list that cannot be read, or of another LLM's tokens.
    """
    for folder in folders:
        if (folder / SPEECH_TOKENS).is_file():
            return _read_list(folder / SPEECH_TOKENS, vocabulary)
    return np.arange(vocabulary, dtype=np.int32)


def _read_list(path: Path, vocabulary: int) -> np.ndarray:
    tokens = read_array(path, BundleError)
    is_list = tokens.ndim == 1 and tokens.dtype.kind in "iu"
    if not is_list or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary):
        raise BundleError(
            f"{path} is no list of tokens of this LLM, whole numbers from 0 to {vocabulary - 1}: "
            "export the bundle, or train the user, again"
        )
    return tokens.astype(np.int32)
