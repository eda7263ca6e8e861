"""EmbedLink, the paper's objective: soft tokens regress on the transcript's embeddings, cast to T.

The paper (arXiv 2411.13766) does not publish how it casts and weighs, so both variants are here:
`stretched`, where a token takes a share of the T places in proportion to its letters, a rough guess
at how long it is spoken; and `padded`, where token l stands at place l and the rest is padding. The
two terms, MSE and cosine, weigh the same once MSE is measured in units of the table's variance.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_align.align.data.examples import Example


def cast_places(token_lengths: list[int], soft_tokens: int) -> np.ndarray:
    """The token at each of T places when stretched: (T,) indices into the transcript's tokens.

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
    """Targets stretched over the T places or, `padded`, one per token and zeros for the rest."""

    def __init__(self, table: Tensor, padded: bool = False):
        self.table = table
        self.padded = padded
        self.variance = float(table.var())

    def __call__(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        targets = torch.stack([self.targets(e, outputs.shape[1]) for e in examples])  # (B, T, D)
        return embedlink_loss(outputs, targets, self.variance)

    def targets(self, example: Example, n_places: int) -> Tensor:
        """(T, D): the embedding that belongs at each place."""
        tokens = self.table[torch.tensor(example.tokens)]  # (L, D)
        if self.padded:
            return F.pad(tokens, (0, 0, 0, max(0, n_places - len(tokens))))[:n_places]
        return tokens[cast_places(example.token_lengths, n_places)]
