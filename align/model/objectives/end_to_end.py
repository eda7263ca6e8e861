"""End-to-end: cross-entropy of the LLM's typed answer, through the frozen LLM. The baseline the others are to beat."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class FrozenLlm:
    """What end-to-end training needs of the LLM: the model, and its prompts around the speech.

    `example.answers` holds, for each prompt, what the LLM answers to the typed transcript, its end token included.
    """

    model: torch.nn.Module  # a transformers causal LM
    prompts: list[Tensor]  # (P, D) embeddings of template and instruction, one for each instruction
    after: Tensor  # (Q, D)

    def __post_init__(self):
        self.model.requires_grad_(False)


class EndToEnd:
    """Mean cross-entropy per token of the answer; the prompts take turns."""

    def __init__(self, llm: FrozenLlm):
        self.llm, self.table = llm, llm.model.get_input_embeddings().weight

    def __call__(self, soft_tokens: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        turns = [(step + i) % len(self.llm.prompts) for i in range(len(examples))]
        rows, labels = zip(
            *(
                self._row(soft[:n], e, turn)
                for soft, n, e, turn in zip(soft_tokens, lengths, examples, turns)
            )
        )
        embeds = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True
        )  # (B, S, D), padded behind: causal
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = self.llm.model(inputs_embeds=embeds, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )

    def _row(self, soft_tokens: Tensor, example, turn: int) -> tuple[Tensor, Tensor]:
        """The embeddings the LLM reads and what it should say at each, -100 where it says nothing."""
        said = torch.tensor(example.answers[turn])
        embedded = self.llm.model.get_input_embeddings()(said)
        row = torch.cat([self.llm.prompts[turn], soft_tokens, self.llm.after, embedded]).to(
            self.table.dtype
        )
        return row, torch.cat([torch.full((len(row) - len(said),), -100), said])
