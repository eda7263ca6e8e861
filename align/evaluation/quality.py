"""Alignment quality: what the LLM answers to speech, against its answer to the same words typed.

ROUGE compares with the typed answer (typed is 1.0 by definition). The word error rate is that of a
repeated sentence against its transcript. The chance level compares every answer with another
sentence's typed answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.data.utterance import Utterance
from tiny_align.align.evaluation.word_errors import error_rates, normaliser_name
from tiny_align.runtime.assistant import Answer, Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import DataError

FIGURES = ("rouge1", "rougeL", "wer", "cer")  # those of before and after a training


@dataclass(frozen=True)
class Quality:
    """Means over the utterances; `rows` has one entry for each."""

    rouge1: float
    rougeL: float
    rougeL_chance: float
    wer: float
    cer: float
    n: int
    normaliser: str  # of the texts whose words and characters are compared
    rows: tuple[dict, ...]


@dataclass(frozen=True)
class EncodedUtterance:
    """An utterance up to the projector, and what its answer is compared with."""

    text: str
    features: np.ndarray  # (N, Da)
    typed: str  # the LLM's answer to the typed text
    split: str = "test"


class Answering(Protocol):
    """What `score` needs of an assistant; its projector may be anything."""

    @property
    def bundle(self) -> Bundle: ...

    def soft_tokens(self, features: np.ndarray) -> np.ndarray: ...

    def answer_soft_tokens(
        self, soft_tokens: np.ndarray, instruction: str | None = None
    ) -> Answer: ...


def evaluate(
    assistant: Assistant,
    utterances: Sequence[Utterance],
    instruction: str | None = None,
    *,
    quiet: bool = False,
) -> Quality:
    """`encode_utterances`, then `score`."""
    encoded = encode_utterances(assistant, utterances, instruction, quiet=quiet)
    return score(assistant, encoded, instruction, quiet=quiet)


def encode_utterances(
    assistant: Assistant,
    utterances: Sequence[Utterance],
    instruction: str | None = None,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
) -> list[EncodedUtterance]:
    """What is the same for every projector: features and typed answers of the usable utterances.

    Args:
        report: counts the others, each of which the log names.

    Raises:
        DataError: none of the utterances can be used.
    """

    def encode(utterance: Utterance) -> EncodedUtterance:
        assistant.llm.encode_words(utterance.text, "the transcript")
        features = assistant.features(utterance.load(assistant.sample_rate))
        typed = assistant.answer_text(utterance.text, instruction).text
        return EncodedUtterance(utterance.text, features, typed, utterance.split)

    report = report or DataReport()
    progress = tqdm(utterances, desc="encode", unit="utt", disable=quiet, mininterval=0.5)
    encoded = [result for _, result in each_usable(progress, encode, report)]
    if utterances and not encoded:
        raise DataError(
            f"none of the {len(utterances)} recordings to measure can be used; {report.explained()}"
        )
    return encoded


def score(
    assistant: Answering,
    encoded: Sequence[EncodedUtterance],
    instruction: str | None = None,
    *,
    quiet: bool = False,
) -> Quality:
    """Answer and repeat every utterance with the assistant's projector, and compare.

    Args:
        instruction: for the answers that ROUGE compares; None: the bundle's. The repeated sentences
            always use the bundle's.
    """
    repeat_instruction = assistant.bundle.manifest.prompt.repeat_instruction
    rows = []
    for utterance in tqdm(encoded, desc="evaluate", unit="utt", disable=quiet, mininterval=0.5):
        soft_tokens = assistant.soft_tokens(utterance.features)
        row = {
            "text": utterance.text,
            "typed": utterance.typed,
            "spoken": assistant.answer_soft_tokens(soft_tokens, instruction).text,
            "repeated": assistant.answer_soft_tokens(soft_tokens, repeat_instruction).text,
        }
        rows.append(row)
    typed = [row["typed"] for row in rows]
    spoken = [row["spoken"] for row in rows]
    texts = [row["text"] for row in rows]
    repeated = [row["repeated"] for row in rows]
    wer, cer = error_rates(texts, repeated)
    return Quality(
        rouge1=rouge(typed, spoken, "rouge1"),
        rougeL=rouge(typed, spoken),
        rougeL_chance=rouge(typed[1:] + typed[:1], spoken),
        wer=wer,
        cer=cer,
        n=len(rows),
        normaliser=normaliser_name(),
        rows=tuple(rows),
    )


def rouge(references: list[str], hypotheses: list[str], kind: str = "rougeL") -> float:
    """Mean F-measure of the hypotheses against their references, pair by pair."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([kind])
    total = 0.0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        total += scorer.score(reference, hypothesis)[kind].fmeasure
    return total / len(references)
