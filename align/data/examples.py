"""Examples that a projector is trained on: an utterance's features and its transcript's tokens.

An example has a token's place in the speech vocabulary, which is extended by the tokens that are
new.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.data.feature_cache import Stored, array_of
from tiny_align.align.data.utterance import Utterance
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary

Features = np.ndarray | Stored  # (N, Da) float32
Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class Example:
    """One utterance for training."""

    features: Features
    tokens: list[int]  # places in the speech vocabulary, which are rows of the objective's table
    token_lengths: list[int]  # letters
    augmentations: tuple[Features, ...] = ()  # of the same recording
    # token ids of the LLM's answer, the end token included, for each prompt of "end-to-end"
    answers: tuple[tuple[int, ...], ...] = ()

    @property
    def takes(self) -> tuple[Features, ...]:
        """The features of the recording and of each augmentation."""
        return (self.features, *self.augmentations)

    def tensor(self) -> Tensor:
        """(N, Da): the recording itself."""
        return torch.from_numpy(array_of(self.features))

    def random_take(self, rng: np.random.Generator) -> Tensor:
        """(N, Da): the recording or one of its augmentations."""
        return torch.from_numpy(array_of(self.takes[rng.integers(len(self.takes))]))

    def expand(self) -> list["Example"]:
        """The recording and each augmentation as an example of its own."""
        return [replace(self, features=take, augmentations=()) for take in self.takes]


def feature_key(features: Features) -> bytes:
    """Identify features: their bytes, or the name of the file they lie in."""
    return features.path.name.encode() if isinstance(features, Stored) else features.tobytes()


def encode_usable(
    assistant: Assistant,
    utterances: Sequence[Utterance],
    encode: Callable[[Utterance], Encoded],
    report: DataReport,
    quiet: bool = False,
) -> list[tuple[Utterance, Encoded]]:
    """(utterance, encode(utterance)) for those that can be used; the report counts the others."""

    def checked(utterance: Utterance) -> Encoded:
        assistant.llm.encode_words(utterance.text, "the transcript")
        return encode(utterance)

    no_bar = quiet or not utterances
    progress = tqdm(utterances, desc="encode", unit="utt", disable=no_bar, mininterval=0.5)
    return list(each_usable(progress, checked, report))


def make_examples(
    llm: LanguageModel,
    vocabulary: SpeechVocabulary,
    texts: Sequence[str],
    takes: Sequence[Sequence[Features]],
) -> tuple[list[Example], SpeechVocabulary]:
    """Examples of transcripts and features, and the vocabulary extended by the texts' new tokens.

    Args:
        takes: the features of every text's recording, then those of every text's first
            augmentation, and so on.
    """
    transcripts = [llm.encode_words(text) for text in texts]
    seen = dict.fromkeys(itertools.chain.from_iterable(transcripts))
    vocabulary = vocabulary.extended(seen)
    letters = {token: len(llm.tokenizer.decode([token]).strip()) for token in seen}
    examples = []
    for transcript, (features, *augmentations) in zip(transcripts, zip(*takes)):
        places = vocabulary.places(transcript)
        lengths = [letters[token] for token in transcript]
        examples.append(Example(features, places, lengths, tuple(augmentations)))
    return examples, vocabulary
