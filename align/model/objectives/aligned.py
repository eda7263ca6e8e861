"""EmbedLink with targets placed where the token is spoken, instead of where a cast guesses.

Nobody marks the times: the projector's own output says, by the best monotonic assignment (Viterbi), where each token
stands, as speech recognisers were long trained from a flat start. That start is the paper's cast.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_align.align.model.objectives.paper import Paper, embedlink_loss


def aligned_places(costs: np.ndarray) -> np.ndarray:
    """The cheapest monotonic assignment of tokens to places, every token at one place or more.

    Args:
        costs: (T, L), the cost of token l at place t; L <= T.
    Returns:
        (T,) indices into the L tokens, from 0 to L - 1, never falling.
    """
    n_places, n_tokens = costs.shape
    best = np.full(n_tokens, np.inf)
    best[0] = costs[0, 0]
    moved = np.zeros(
        (n_places, n_tokens), bool
    )  # whether the best way to (t, l) comes from token l - 1
    for t in range(1, n_places):
        before = np.concatenate([[np.inf], best[:-1]])
        moved[t] = before < best
        best = np.minimum(before, best) + costs[t]
    places = np.empty(n_places, np.int64)
    token = n_tokens - 1
    for t in range(n_places - 1, -1, -1):
        places[t] = token
        token -= moved[t, token]
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

    def __call__(self, soft_tokens: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        if step < self.flat_start:
            return super().__call__(soft_tokens, lengths, examples, step)
        targets = torch.stack(
            [self._placed(e, soft) for e, soft in zip(examples, soft_tokens.detach())]
        )
        return embedlink_loss(soft_tokens, targets, self.variance)

    def _placed(self, example, soft_tokens: Tensor) -> Tensor:
        tokens = self.table[torch.tensor(example.tokens)]  # (L, D)
        if len(tokens) > len(soft_tokens):
            return self.targets(example, len(soft_tokens))
        return tokens[aligned_places(pair_costs(soft_tokens, tokens, self.variance).numpy())]
