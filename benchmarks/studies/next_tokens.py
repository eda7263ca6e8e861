"""How near a form of an LLM is to the LLM itself: the next token, along the LLM's own answers.

The text is fixed (teacher forcing): the FP32 model's greedy answers to PROMPTS, up to and with the
end token, at most 64 tokens each. At every token of an answer both give probabilities of all
tokens; their divergence KL(FP32 || form) and whether both have the same top token are averaged.

A form is whatever returns logits for a prompt and an answer: a model in PyTorch, a graph in ONNX
Runtime, a GGUF file in llama.cpp. A `Reference` holds the FP32 model's last hidden states and its
output layer, from which its logits are computed anew: a fraction of the logits' size, and exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks.studies.prompts import PROMPTS
from tiny_align.export.llms import end_tokens, listed_end_tokens
from tiny_align.runtime.backends.base import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LENGTH = 64  # tokens of an answer, at most

# a prompt's and an answer's token ids -> (n, V) float32 logits at every token of the answer
Logits = Callable[[list[int], list[int]], np.ndarray]


@dataclass(frozen=True)
class Reference:
    """The FP32 model's answers, and what its logits come from."""

    prompts: list[list[int]]  # token ids
    answers: list[list[int]]  # token ids
    states: list[np.ndarray]  # (n, D) float32 of every answer: the output layer's input
    head: np.ndarray  # (V, D) float32, the output layer

    def log_probabilities(self, i: int) -> np.ndarray:
        """(n, V) float32 at every token of an answer."""
        return log_softmax(self.states[i] @ self.head.T)

    def shortened(self, n_tokens: int) -> "Reference":
        """The same with answers of at most so many tokens."""
        answers = [answer[:n_tokens] for answer in self.answers]
        states = [rows[:n_tokens] for rows in self.states]
        return Reference(self.prompts, answers, states, self.head)

    def save(self, path: Path) -> None:
        """Write an .npz."""
        arrays = {"head": self.head, "states": np.concatenate(self.states)}
        for name, lists in (("prompts", self.prompts), ("answers", self.answers)):
            arrays[name] = np.concatenate(lists)
            arrays[f"{name}_lengths"] = np.array([len(ids) for ids in lists])
        np.savez(path, **arrays)

    @staticmethod
    def load(path: Path) -> "Reference":
        with np.load(path, allow_pickle=False) as arrays:
            answer_ends = np.cumsum(arrays["answers_lengths"])[:-1]
            prompt_ends = np.cumsum(arrays["prompts_lengths"])[:-1]
            prompts = np.split(arrays["prompts"], prompt_ends)
            answers = np.split(arrays["answers"], answer_ends)
            return Reference(
                [ids.tolist() for ids in prompts],
                [ids.tolist() for ids in answers],
                np.split(arrays["states"], answer_ends),
                arrays["head"],
            )


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """A prompt's token ids: in the model's chat template, or the text if it has none."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def reference_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str] = PROMPTS,
    length: int = LENGTH,
) -> Reference:
    """The FP32 model's greedy answers.

    Raises:
        ValueError: a model that changes the output layer's result, as by a soft cap.
    """
    import torch

    ends = listed_end_tokens(model)
    if tokenizer.chat_template:
        ends = list(end_tokens(model, tokenizer))
    head = model.get_output_embeddings().weight.detach()
    prompts = []
    answers = []
    states = []
    with torch.inference_mode():
        for text in tqdm(texts, desc="FP32 answers", unit="prompt"):
            prompt = encode_prompt(tokenizer, text)
            answer = _answer(model, prompt, ends, length)
            out = _run(model, prompt, answer, output_hidden_states=True)
            rows = out.hidden_states[-1][0, len(prompt) - 1 :]
            if not torch.allclose(rows @ head.T, out.logits[0], rtol=1e-3, atol=1e-3):
                raise ValueError(
                    "expected logits = output layer x last hidden state, got others: "
                    "the study does not cover this model's soft cap or scale"
                )
            prompts.append(prompt)
            answers.append(answer)
            states.append(rows.numpy().copy())
    return Reference(prompts, answers, states, head.numpy().copy())


def _answer(model: "PreTrainedModel", prompt: list[int], ends: list[int], length: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    return found[0, len(prompt) :].tolist()


def _run(model: "PreTrainedModel", prompt: list[int], answer: list[int], **options: bool):
    """One pass over a prompt and its answer; logits at every token of the answer."""
    import torch

    ids = torch.tensor([prompt + answer[:-1]])
    return model(ids, logits_to_keep=len(answer), use_cache=False, **options)


def compare(reference: Reference, logits: Logits, exact: Logits | None = None) -> dict[str, float]:
    """Means over all tokens of all answers.

    Args:
        exact: what the form is compared with; None: the FP32 model.
    Returns:
        `divergence`: KL(FP32 || form) in nats; `divergence_error`: the standard error of that mean
        over prompts; `same`: the share of tokens at which both have the same top token.
    """
    divergences = []
    same = []
    for i, prompt in enumerate(tqdm(reference.prompts, unit="prompt", leave=False)):
        answer = reference.answers[i]
        right = log_softmax(exact(prompt, answer)) if exact else reference.log_probabilities(i)
        form = log_softmax(logits(prompt, answer))
        same.append(right.argmax(axis=1) == form.argmax(axis=1))
        divergences.append((np.exp(right) * (right - form)).sum(axis=1))
    means = [rows.mean() for rows in divergences]
    return {
        "divergence": float(np.concatenate(divergences).mean()),
        "divergence_error": float(np.std(means) / np.sqrt(len(means))),
        "same": float(np.concatenate(same).mean()),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, V) float32 logits to log-probabilities; by PyTorch, which is faster than numpy."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(logits)).log_softmax(dim=1).numpy()


# --- forms ---


def torch_logits(model: "PreTrainedModel") -> Logits:
    """Of a model in PyTorch: one pass over a prompt and its answer."""
    import torch

    def logits(prompt: list[int], answer: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return _run(model, prompt, answer).logits[0].float().numpy()

    return logits


def decoder_logits(decoder: Decoder, embeddings: np.ndarray) -> Logits:
    """Of a loaded graph, which returns the last position's logits only: token by token.

    Args:
        embeddings: (V, D) float32 rows as the graph takes them, times the embedding scale.
    """

    def logits(prompt: list[int], answer: list[int]) -> np.ndarray:
        cache = decoder.open_cache(len(prompt) + len(answer))
        past = 0
        rows = []
        for ids in [prompt, *([token] for token in answer[:-1])]:
            scores = decoder.run(np.ascontiguousarray(embeddings[ids]), cache, past)
            rows.append(scores.logits.copy())
            past += len(ids)
        return np.stack(rows)

    return logits
