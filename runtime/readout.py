"""From what the projector gives to what the LLM reads: runs of the same become one soft token.

A bundle's projector either pools an utterance to T soft tokens, of which neighbours that are alike are merged, or
gives one vector per moment and a blank's logit, which are read as CTC reads them. Its manifest says which.
"""

from dataclasses import dataclass

import numpy as np

FEW, SURE = 2, 0.7  # so few tokens, none of them this likely in any frame, are a noise that was taken for a word


@dataclass(frozen=True)
class Readout:
    """How the projector's output is read, in the bundle's manifest."""

    kind: str  # "ctc" or "pooled"
    scale: float = 1.0  # "ctc": of a vector's product with a token's embedding, to give the token's logit
    merge_cosine: float | None = None  # "pooled": neighbours more alike than this become one; None: they stay


def ctc_scale(table: np.ndarray) -> float:
    """The scale that gives a vector of unit variance logits of unit variance; table (V, D)."""
    return float(1 / (table.astype(np.float32).std() * np.sqrt(table.shape[1])))


def collapse(frames: np.ndarray, table: np.ndarray, scale: float) -> np.ndarray:
    """Greedy CTC over the embedding table: every run of one token becomes that token's expected embedding.

    Args:
        frames: (N, D + 1) float32; the last column is the blank's logit.
        table: (K, D) float32, the tokens that speech may be, as the LLM sees them.
    Returns:
        (T', D) float32; no row where nothing was said, or so little and so doubtful that it was a noise.
    """
    logits = frames[:, :-1] @ table.T * np.float32(scale)  # (N, K)
    best = np.where(logits.max(axis=1) > frames[:, -1], logits.argmax(axis=1), -1)
    starts = np.flatnonzero((best >= 0) & (best != np.concatenate([[-1], best[:-1]])))
    if not len(starts):
        return np.zeros((0, table.shape[1]), np.float32)
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)  # 1 for the best
    total = weights.sum(axis=1, keepdims=True)
    likely = 1 / (total + np.exp((frames[:, -1:] - top).clip(max=80)))  # (N, 1) the best token's probability
    if len(starts) <= FEW and likely.max() < SURE:
        return np.zeros((0, table.shape[1]), np.float32)
    weights /= total
    run = np.concatenate([[0], np.cumsum(best[1:] != best[:-1])])  # (N,) which run a frame is in
    return np.stack([weights[run == run[start]].mean(axis=0) @ table for start in starts]).astype(np.float32)


def merge_similar(soft_tokens: np.ndarray, cosine: float | None) -> np.ndarray:
    """(T, D) -> (T', D): runs of neighbours more alike than `cosine` become their mean.

    A word that takes four of the projector's T places is one token to the LLM, as it is in text.
    """
    if cosine is None or len(soft_tokens) < 2:
        return soft_tokens
    unit = soft_tokens / np.linalg.norm(soft_tokens, axis=1, keepdims=True).clip(1e-9)
    starts = np.flatnonzero(np.concatenate([[True], (unit[1:] * unit[:-1]).sum(axis=1) < cosine]))
    lengths = np.diff([*starts, len(soft_tokens)])
    return np.add.reduceat(soft_tokens, starts, axis=0) / lengths[:, None].astype(np.float32)
