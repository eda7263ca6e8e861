"""EmbedLink as the paper has it: soft tokens regress on the transcript's embeddings cast to T (arXiv 2411.13766).

How the paper casts and weighs is not public, so both readings are here: `stretched`, where a token takes a share of
the T places in proportion to its letters, a rough guess at how long it is spoken; and `padded`, where token l stands
at place l and the rest is padding. The two terms, MSE and cosine, weigh the same once MSE is measured in units of
the table's variance.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cast_places(token_lengths: list[int], soft_tokens: int) -> np.ndarray:
    """Which token stands at each of T places when stretched: (T,) indices into the transcript's tokens.

    Args:
        token_lengths: letters of every token; at least one counts for each.
        soft_tokens: T.
    """
    edges = np.cumsum(np.maximum(1, token_lengths))
    middles = (np.arange(soft_tokens) + 0.5) / soft_tokens * edges[-1]
    return np.searchsorted(edges, middles, side="right").clip(max=len(edges) - 1)


def embedlink_loss(soft_tokens: Tensor, targets: Tensor, variance: float) -> Tensor:
    """MSE in units of the table's variance plus cosine distance; both (..., D)."""
    mse = F.mse_loss(soft_tokens, targets) / variance
    cosine = 1 - F.cosine_similarity(soft_tokens, targets, dim=-1).mean()
    return mse + cosine


class Paper:
    """Targets stretched over the T places or, `padded`, one token per place and the padding's target zero."""

    def __init__(self, table: Tensor, padded: bool = False):
        self.table, self.padded, self.variance = table, padded, float(table.var())

    def __call__(self, soft_tokens: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        targets = torch.stack(
            [self.targets(e, soft_tokens.shape[1]) for e in examples]
        )  # (B, T, D)
        return embedlink_loss(soft_tokens, targets, self.variance)

    def targets(self, example, n_places: int) -> Tensor:
        """(T, D): the embedding that belongs at each place."""
        tokens = self.table[torch.tensor(example.tokens)]  # (L, D)
        if self.padded:
            return F.pad(tokens, (0, 0, 0, max(0, n_places - len(tokens))))[:n_places]
        return tokens[cast_places(example.token_lengths, n_places)]
