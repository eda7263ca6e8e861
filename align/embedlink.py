"""EmbedLink: train a projector on the LLM's own text embeddings, without running the LLM.

After Tiny-Align (arXiv 2411.13766): the embeddings of the transcript are cast to the projector's T soft tokens
and matched with MSE + cosine. How the paper casts and weighs is not public; ours: a token takes a share of the
T places in proportion to its letters, a rough guess at how long it is spoken, and the two terms weigh
the same once MSE is measured in units of the table's variance.
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


def embedlink_loss(soft_tokens: Tensor, targets: Tensor, variance: float) -> Tensor:
    """MSE in units of the table's variance plus cosine distance; both (B, T, D)."""
    mse = F.mse_loss(soft_tokens, targets) / variance
    cosine = 1 - F.cosine_similarity(soft_tokens, targets, dim=-1).mean()
    return mse + cosine
