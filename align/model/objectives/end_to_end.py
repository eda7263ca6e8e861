"""End-to-end: cross-entropy of the LLM's answer, through the frozen LLM.

The baseline that the other objectives are compared with.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiny_align.align.data.examples import Example

IGNORED = -100  # label of a position at which the LLM is not trained to say anything


class CausalLmOutput(Protocol):
    """What a transformers causal LM returns."""

    logits: Tensor  # (B, S, V)


class CausalLm(Protocol):
    """What is used of a transformers causal LM."""

    def __call__(self, *, inputs_embeds: Tensor, use_cache: bool) -> CausalLmOutput: ...

    def get_input_embeddings(self) -> torch.nn.Embedding: ...

    def requires_grad_(self, requires_grad: bool = True) -> torch.nn.Module: ...


@dataclass
class FrozenLlm:
    """What end-to-end training needs of the LLM: the model, and its prompts around the speech.

    `Example.answers` holds, for each prompt, the LLM's answer to the typed transcript, its end
    token included.
    """

    model: CausalLm
    prompts: list[Tensor]  # (P, D) embeddings of template and instruction, one per instruction
    after: Tensor  # (Q, D) embeddings between speech and answer

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)


class EndToEnd:
    """Mean cross-entropy per token of the answer; the prompts take turns."""

    def __init__(self, llm: FrozenLlm):
        self.llm = llm
        self.table = llm.model.get_input_embeddings().weight

    def __call__(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        rows = []
        row_labels = []
        for i, example in enumerate(examples):
            prompt = (step + i) % len(self.llm.prompts)
            row, labels = self._row(outputs[i, : lengths[i]], example, prompt)
            rows.append(row)
            row_labels.append(labels)
        embeddings = pad_sequence(rows, batch_first=True)  # (B, S, D), padded at the end: causal
        labels = pad_sequence(row_labels, batch_first=True, padding_value=IGNORED)  # (B, S)
        logits = self.llm.model(inputs_embeds=embeddings, use_cache=False).logits
        predictions = logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=IGNORED)

    def _row(self, soft_tokens: Tensor, example: Example, prompt: int) -> tuple[Tensor, Tensor]:
        """(S, D) embeddings that the LLM reads, and (S,) labels: the answer, IGNORED before it."""
        answer = torch.tensor(example.answers[prompt])
        embedded = self.llm.model.get_input_embeddings()(answer)
        row = torch.cat([self.llm.prompts[prompt], soft_tokens, self.llm.after, embedded])
        ignored = torch.full((len(row) - len(answer),), IGNORED)
        return row.to(self.table.dtype), torch.cat([ignored, answer])
