"""EmbedLink with each target at the place where its token is spoken, not where a cast guesses.

No data set marks these places. The projector's own output tells them: the cheapest monotonic
assignment of tokens to soft tokens (Viterbi), as speech recognisers were long trained from a flat
start. The flat start is the paper's cast.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_align.align.data.examples import Example
from tiny_align.align.model.objectives.paper import Paper, embedlink_loss


def aligned_places(costs: np.ndarray) -> np.ndarray:
    """The cheapest monotonic assignment of tokens to places, every token at one place or more.

    Args:
        costs: (T, L), the cost of token l at place t; L <= T.

    Returns:
        (T,) indices into the L tokens, from 0 to L - 1, never falling.
    """
    n_places, n_tokens = costs.shape
    total = np.full(n_tokens, np.inf)  # (L,) cost of the cheapest path to (t, l)
    total[0] = costs[0, 0]
    advanced = np.zeros((n_places, n_tokens), bool)  # whether that path comes from token l - 1
    for t in range(1, n_places):
        from_previous = np.concatenate([[np.inf], total[:-1]])
        advanced[t] = from_previous < total
        total = np.minimum(from_previous, total) + costs[t]
    places = np.empty(n_places, np.int64)
    token = n_tokens - 1
    for t in range(n_places - 1, -1, -1):
        places[t] = token
        token -= advanced[t, token]
    return places


def pair_costs(soft_tokens: Tensor, tokens: Tensor, variance: float) -> Tensor:
    """`embedlink_loss` of every soft token (T, D) with every token's embedding (L, D) -> (T, L)."""
    mse = (soft_tokens[:, None] - tokens[None]).square().mean(dim=-1) / variance
    return mse + 1 - F.cosine_similarity(soft_tokens[:, None], tokens[None], dim=-1)


class Aligned(Paper):
    """Cast targets for `flat_start` steps, aligned ones from then on."""

    def __init__(self, table: Tensor, flat_start: int):
        super().__init__(table)
        self.flat_start = flat_start

    def __call__(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        if step < self.flat_start:
            return super().__call__(outputs, lengths, examples, step)
        targets = []
        for example, soft_tokens in zip(examples, outputs.detach()):
            targets.append(self._aligned_targets(example, soft_tokens))
        return embedlink_loss(outputs, torch.stack(targets), self.variance)

    def _aligned_targets(self, example: Example, soft_tokens: Tensor) -> Tensor:
        """(T, D), or the cast ones if there are more tokens than soft tokens."""
        tokens = self.table[torch.tensor(example.tokens)]  # (L, D)
        if len(tokens) > len(soft_tokens):
            return self.targets(example, len(soft_tokens))
        return tokens[aligned_places(pair_costs(soft_tokens, tokens, self.variance).numpy())]
