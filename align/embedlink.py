"""EmbedLink: train a projector on the LLM's own text embeddings, without running the LLM.

After Tiny-Align (arXiv 2411.13766): the embeddings of the transcript are cast to the projector's T soft tokens
and matched with MSE + cosine. How the paper casts and weighs is not public; ours: a token takes a share of the
T places in proportion to its letters, a rough guess at how long it is spoken, and the two terms weigh
the same once MSE is measured in units of the table's variance.

`aligned_places` is our step beyond the paper: instead of guessing where a token is spoken, let the projector's own
output say so, by the best monotonic assignment (Viterbi), as speech recognisers were long trained from a flat start.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def cast_places(token_lengths: list[int], soft_tokens: int) -> np.ndarray:
    """Which token stands at each of T places: (T,) indices into the transcript's tokens.

    Args:
        token_lengths: letters of every token; at least one counts for each.
        soft_tokens: T.
    """
    edges = np.cumsum(np.maximum(1, token_lengths))
    middles = (np.arange(soft_tokens) + 0.5) / soft_tokens * edges[-1]
    return np.searchsorted(edges, middles, side="right").clip(max=len(edges) - 1)


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
    moved = np.zeros((n_places, n_tokens), bool)  # whether the best way to (t, l) comes from token l - 1
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


def embedlink_loss(soft_tokens: Tensor, targets: Tensor, variance: float) -> Tensor:
    """MSE in units of the table's variance plus cosine distance; both (B, T, D)."""
    mse = F.mse_loss(soft_tokens, targets) / variance
    cosine = 1 - F.cosine_similarity(soft_tokens, targets, dim=-1).mean()
    return mse + cosine


def pair_costs(soft_tokens: Tensor, tokens: Tensor, variance: float) -> Tensor:
    """`embedlink_loss` of every soft token (T, D) with every token's embedding (L, D) -> (T, L)."""
    mse = (soft_tokens[:, None] - tokens[None]).square().mean(dim=-1) / variance
    return mse + 1 - F.cosine_similarity(soft_tokens[:, None], tokens[None], dim=-1)
