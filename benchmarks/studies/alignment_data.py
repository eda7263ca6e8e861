"""What both parts of the alignment study use: setting, recordings, features, measuring."""

import functools
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.data.examples import make_examples
from tiny_align.align.data.feature_cache import cached_features
from tiny_align.align.data.rehearsal import rehearsal_examples
from tiny_align.align.evaluation.quality import (
    EncodedUtterance,
    Quality,
    encode_utterances,
    rouge,
    score,
)
from tiny_align.align.model.objectives import POOLED
from tiny_align.align.model.windows import project
from tiny_align.align.training.align_user import AUGMENTATIONS
from tiny_align.benchmarks.standard.pipelines import WEIGHTS
from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference import corpus, recordings, speech
from tiny_align.runtime.assistant import Answer, Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.readout import collapse, ctc_scale, merge_similar

if TYPE_CHECKING:
    from tiny_align.align.data.examples import Example
    from tiny_align.align.model.projector import BridgeFormer

VOICES = speech.NEW_VOICES
MERGE_COSINE = 0.85  # where a projector pools
FEW = (10, 25, 50, 100, 200)  # utterances
N_TEST = 40
FIGURES = ("rouge1", "rougeL", "wer")


@dataclass(frozen=True)
class Setting:
    """What a run is; a stored result is used for the same setting only."""

    bundle: str
    work: str
    budget_s: float  # of training from nothing, on one core
    personal_s: float  # of training for a voice
    known: int  # utterances by voices the encoder knows
    seeds: int
    few: list[int]  # utterances to personalise on

    def to_json(self) -> dict[str, Any]:
        """Everything but the folders."""
        fields = asdict(self)
        del fields["bundle"], fields["work"]
        return fields


# --- measuring ---


class TorchAssistant:
    """An assistant whose projector is still in PyTorch; `align.evaluate.score` takes it."""

    def __init__(self, assistant: Assistant, projector: "BridgeFormer"):
        self.bundle = assistant.bundle
        self._assistant = assistant
        self._projector = projector
        self._table = assistant.speech_vocabulary.table

    def soft_tokens(self, features: np.ndarray) -> np.ndarray:
        """(N, Da) features -> (T, D)."""
        import torch

        with torch.no_grad():
            projected = project(
                self._projector, [torch.from_numpy(features)], self._assistant.windows
            )
        vectors = projected[0][0].numpy()
        if self._projector.config.soft_tokens:
            return merge_similar(vectors, MERGE_COSINE)
        return collapse(vectors, self._table, ctc_scale(self._table))

    def answer_soft_tokens(self, soft_tokens: np.ndarray, instruction: str | None = None) -> Answer:
        return self._assistant.answer_soft_tokens(soft_tokens, instruction)


def measure_projector(
    assistant: Assistant, projector: "BridgeFormer", test: list[EncodedUtterance]
) -> dict[str, float]:
    """FIGURES and the chance level of a projector in PyTorch."""
    return figures_of(score(TorchAssistant(assistant, projector.eval()), test, quiet=True))


def figures_of(quality: Quality) -> dict[str, float]:
    return {name: getattr(quality, name) for name in (*FIGURES, "rougeL_chance")}


# --- data ---


def prepare(setting: Setting, objectives: list[str]) -> None:
    """Write every recording and, for the table's objectives, its features into the work folder."""
    work = Path(setting.work)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "known").exists():
        write_known(work / "known", setting.known)
    for voice in VOICES:
        if not (work / voice).exists():
            recordings.write_voice(voice, work / voice, max(FEW), N_TEST)
    by_form = {}  # features depend only on whether an objective pools
    for objective in objectives:
        by_form[objective in POOLED] = objective
    for objective in by_form.values():
        with Assistant.load(open_bundle(setting.bundle, objective)) as assistant:
            for name in ("known", *VOICES):
                load_examples(assistant, work / name)
            if objective not in POOLED:
                rehearsal_examples(assistant, "ctc", work / "features")


def write_known(out: Path, n: int) -> None:
    """`n` training sentences and N_TEST held-out ones by random espeak-ng voices, as a data set."""
    espeak = speech.Espeak(seed=0)
    rng = random.Random(31)
    recordings.write_recordings(out, n, N_TEST, 31, lambda text: espeak.say_randomly(text, rng))


def open_bundle(path: Path | str, objective: str) -> Bundle:
    """The bundle, without windows where the objective's projectors take a whole utterance."""
    bundle = Bundle.open(path)
    if objective in POOLED:
        return Bundle(bundle.path, replace(bundle.manifest, windows=None))
    return bundle


def load_examples(assistant: Assistant, folder: Path, n: int | None = None) -> "list[Example]":
    """The first `n` of a data set's train split, augmented and with the answers for end-to-end."""
    utterances = split_of(load_dataset(folder), "train")[:n]
    texts = [utterance.text for utterance in utterances]
    takes = augmented_features(assistant, utterances, folder / "features")
    llm = assistant.llm
    end = assistant.bundle.manifest.llm.end_tokens[0]
    answers = corpus_answers()
    examples = []
    unanswered, _ = make_examples(llm, assistant.speech_vocabulary, texts, takes)
    for text, example in zip(texts, unanswered):
        answered = (*llm.encode(answers[text]), end)
        repeated = (*llm.encode(text), end)
        examples.append(replace(example, answers=(answered, repeated)))
    return examples


def augmented_features(assistant: Assistant, utterances: list, cache: Path) -> list[list]:
    """Features of the utterances as they are, and of each of their augmentations."""
    takes = []
    for k in range(AUGMENTATIONS + 1):
        takes.append(cached_features(assistant, utterances, cache, augmentation=k))
    return takes


@functools.cache
def corpus_answers() -> dict[str, str]:
    """Every sentence that is trained on, and the answer to it."""
    drawn = corpus.sentences(10_000, 31) + corpus.sentences(max(FEW), 11)
    return {sentence.text: sentence.answer for sentence in drawn}


def encode_test(assistant: Assistant, folder: Path) -> list[EncodedUtterance]:
    """The test split of a data set."""
    return encode_utterances(assistant, split_of(load_dataset(folder), "test"), quiet=True)


# --- the cascade ---


def measure_cascade(assistant: Assistant, folder: Path) -> dict[str, float]:
    """The encoder's own letters, read by the LLM as text: what there is without a projector."""
    import torch
    from transformers import ParakeetForCTC

    from tiny_align.reference.encoder import FRONT_END, decode_letters

    model = load_pretrained(ParakeetForCTC, WEIGHTS / "encoder").eval()
    typed = []
    spoken = []
    for utterance in split_of(load_dataset(folder), "test"):
        frames = FRONT_END(utterance.load(speech.SAMPLE_RATE))
        with torch.no_grad():
            logits = model(torch.from_numpy(frames)[None]).logits[0]
        letters = decode_letters(logits.argmax(-1).numpy())
        spoken.append(assistant.answer_text(letters or " ").text)
        typed.append(assistant.answer_text(utterance.text).text)
    return {"rougeL": rouge(typed, spoken), "n": len(spoken)}
