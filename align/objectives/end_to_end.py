"""End-to-end: cross-entropy of the LLM's typed answer, through the frozen LLM. The baseline the others are to beat."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class FrozenLlm:
    """What end-to-end training needs of the LLM: the model, and its prompt around the speech.

    `example.answer` holds the tokens the LLM answers to the typed transcript, its end token included.
    """

    model: torch.nn.Module  # a transformers causal LM
    before: Tensor  # (P, D) embeddings of template and instruction
    after: Tensor  # (Q, D)

    def __post_init__(self):
        self.model.requires_grad_(False)


class EndToEnd:
    """Mean cross-entropy per token of the answer."""

    def __init__(self, llm: FrozenLlm):
        self.llm, self.table = llm, llm.model.get_input_embeddings().weight

    def __call__(self, soft_tokens: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        rows, labels = zip(*(self._row(soft[:n], e.answer) for soft, n, e in zip(soft_tokens, lengths, examples)))
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, S, D), padded behind: causal
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = self.llm.model(inputs_embeds=embeds, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)

    def _row(self, soft_tokens: Tensor, answer: list[int]) -> tuple[Tensor, Tensor]:
        """The embeddings the LLM reads and what it should say at each, -100 where it says nothing."""
        said = torch.tensor(answer)
        embedded = self.llm.model.get_input_embeddings()(said)
        row = torch.cat([self.llm.before, soft_tokens, self.llm.after, embedded])
        return row, torch.cat([torch.full((len(row) - len(said),), -100), said])
