"""What fewer bits cost the reference LLM, on typed sentences and on the shipped recordings."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.quality import rouge
from tiny_align.benchmarks.standard.pipelines import WEIGHTS
from tiny_align.benchmarks.studies.next_tokens import log_softmax
from tiny_align.benchmarks.studies.quantisation_ways import WAYS, graph_bytes
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.reference import corpus
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel

if TYPE_CHECKING:
    import torch

LLM = WEIGHTS / "llm"


class Comparison:
    """Compares forms of one LLM with its FP32 graph: on typed sentences, and on soft tokens."""

    def __init__(
        self,
        assistant: Assistant,
        exact: Path,
        spec: GraphSpec,
        sentences: list[corpus.Sentence],
        soft_tokens: list[np.ndarray],
    ):
        """
        Args:
            exact: the FP32 graph, and `spec` its description.
            soft_tokens: (T, D) of each recording.
        """
        self._bundle = assistant.bundle
        self._spec = spec
        self._sentences = sentences
        self._soft_tokens = soft_tokens
        self._prompts = []
        self._answers = []  # token ids with the end token
        self._texts = []
        self._logits = []  # log-probabilities at every token of an answer
        with self._load(exact) as llm:
            for sentence in sentences:
                prompt = llm.assemble(llm.embed(llm.encode_words(sentence.text)))
                tokens = list(llm.generate(prompt, Decoding()))
                answer = [*tokens, llm.spec.end_tokens[0]]
                self._prompts.append(prompt)
                self._answers.append(answer)
                self._texts.append(llm.tokenizer.decode(tokens))
                self._logits.append(log_probabilities(llm, prompt, answer))
            self._spoken = self._answer_speech(llm)

    @contextlib.contextmanager
    def _load(self, path: Path) -> Iterator[LanguageModel]:
        with PlainDecoder(path, self._spec, 1) as decoder:
            yield LanguageModel(self._bundle, decoder)

    def _answer_speech(self, llm: LanguageModel) -> list[str]:
        return [generate_text(llm, llm.assemble(each)) for each in self._soft_tokens]

    def measure(self, path: Path) -> dict[str, float]:
        """Of a graph: shares and means over tokens, sentences or recordings."""
        texts = []
        equal_tokens = []  # of each sentence, whether the graph has the same top token
        divergences = []
        with self._load(path) as llm:
            for i, prompt in enumerate(self._prompts):
                exact = self._logits[i]
                logits = log_probabilities(llm, prompt, self._answers[i])
                equal = exact.argmax(axis=1) == logits.argmax(axis=1)
                texts.append(self._texts[i] if equal.all() else generate_text(llm, prompt))
                equal_tokens.append(equal)
                divergences.append((np.exp(exact) * (exact - logits)).sum(axis=1))
            spoken = self._answer_speech(llm)
        return {
            "rougeL": rouge([sentence.answer for sentence in self._sentences], texts),
            "tokens_equal": float(np.mean(np.concatenate(equal_tokens))),
            "answers_equal": float(np.mean([equal.all() for equal in equal_tokens])),
            "divergence": float(np.mean(np.concatenate(divergences))),
            "spoken_rougeL": rouge(self._spoken, spoken),
        }


def log_probabilities(llm: LanguageModel, prompt: np.ndarray, answer: list[int]) -> np.ndarray:
    """(n, V): log-probabilities at every token of an answer, after the tokens before it."""
    cache = Cache()
    rows = [llm.prefill(np.ascontiguousarray(prompt, np.float32), cache).logits.copy()]
    for token in answer[:-1]:
        rows.append(llm.prefill(llm.embed([token]), cache).logits.copy())
    return log_softmax(np.stack(rows))


def generate_text(llm: LanguageModel, prompt: np.ndarray) -> str:
    return llm.tokenizer.decode(list(llm.generate(prompt, Decoding())))


def accuracy(
    bundle: Path,
    n_sentences: int,
    folder: Path,
    change: Callable[["torch.nn.Module"], None] | None = None,
) -> list[dict[str, float]]:
    """Every way's figures for the reference LLM, after `change` to its weights."""
    from tiny_align.export.llms import llm_graph, load_llm

    llm, _ = load_llm(str(LLM))
    if change:
        change(llm)
    exact = folder / "exact.onnx"
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's progress
        spec = llm_graph(llm).save(exact)
    sentences = corpus.sentences(n_sentences, 21, held_out=True)
    rows = []
    with Assistant.load(bundle, threads=1) as assistant:
        soft_tokens = []
        for utterance in split_of(load_dataset(shipped("voice")), "test"):
            features = assistant.features(utterance.load(assistant.sample_rate))
            soft_tokens.append(assistant.soft_tokens(features))
        comparison = Comparison(assistant, exact, spec, sentences, soft_tokens)
        for i, way in enumerate(tqdm(WAYS, desc="accuracy", unit="form")):
            path = folder / f"{i}.onnx"
            way.write(exact, path)
            rows.append(comparison.measure(path) | {"bytes": graph_bytes(path)})
    return rows
