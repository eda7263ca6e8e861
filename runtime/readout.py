"""The readout: the projector's vectors to soft tokens, one for each run of the same.

A bundle's projector either pools an utterance to T soft tokens, of which similar neighbours are
merged, or gives one vector and the logit of a blank per moment, which are read as CTC reads them.
The manifest says which. A reader takes the output in pieces, and gives each soft token as soon as
nothing that follows can change it.
"""

from dataclasses import dataclass

import numpy as np

# at most so many tokens, none of them this likely in any frame, are a noise taken for a word
MAX_DOUBTFUL_RUNS = 2
CERTAIN = 0.7


@dataclass(frozen=True)
class Readout:
    """How the projector's output is read, in the bundle's manifest."""

    kind: str  # "ctc" or "pooled"
    # "ctc": times a vector's product with a token's embedding, it gives the token's logit
    scale: float = 1.0
    # "pooled": more similar neighbours become one; None: they stay
    merge_cosine: float | None = None


def ctc_scale(table: np.ndarray) -> float:
    """The scale that gives a vector of unit variance logits of unit variance; table (K, D)."""
    return float(1 / (table.astype(np.float32).std() * np.sqrt(table.shape[1])))


class CtcReader:
    """Greedy CTC over the embedding table: a run of one token becomes its expected embedding.

    There are no soft tokens if no word is recognised, or only a few doubtful ones, which are taken
    for noise. A copy (copy.copy) goes on by itself: no value is changed in place.
    """

    def __init__(self, table: np.ndarray, scale: float) -> None:
        """table: (K, D) float32, the speech vocabulary as the LLM sees it."""
        self._table = table
        self._scale = np.float32(scale)
        self._reset()

    def _reset(self) -> None:
        # the present run: its token (-1: the blank), summed weights (K,), frames
        self._token = -1
        self._weights: np.ndarray | float = 0.0
        self._n_frames = 0
        # the utterance so far
        self._n_runs = 0
        self._max_probability = 0.0  # of the most likely token in any frame
        self._held_back: list[np.ndarray] = []  # (D,) each: soft tokens, while few and doubtful

    def push(self, frames: np.ndarray) -> np.ndarray:
        """The soft tokens that are certain now: (N, D + 1) float32 -> (T, D) float32.

        Args:
            frames: vectors; the last column is the blank's logit.
        """
        # a large vocabulary is empty until the first training
        if len(frames) and len(self._table):
            tokens, weights = self._classify(frames)
            cuts = np.flatnonzero(tokens[1:] != tokens[:-1]) + 1
            edges = [0, *cuts, len(tokens)]
            for start, end in zip(edges, edges[1:]):
                self._extend_run(int(tokens[start]), weights[start:end])
        return self._take_certain()

    def finish(self) -> np.ndarray:
        """(T, D): the rest; the next frame is another utterance's."""
        self._end_run()
        rest = self._take_certain()
        self._reset()
        return rest

    def _classify(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) most likely tokens, -1 for the blank, and (N, K) each token's share in a frame."""
        blank = frames[:, -1:]  # (N, 1)
        logits = frames[:, :-1] @ self._table.T * self._scale  # (N, K)
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)  # 1 for the most likely token
        total = weights.sum(axis=1, keepdims=True)
        probability = 1 / (total + np.exp((blank - top).clip(max=80)))  # (N, 1) of that token
        self._max_probability = max(self._max_probability, float(probability.max()))
        tokens = np.where(top[:, 0] > frames[:, -1], logits.argmax(axis=1), -1)
        return tokens, weights / total

    def _extend_run(self, token: int, weights: np.ndarray) -> None:
        if token != self._token:
            self._end_run()
            self._token = token
            self._n_runs += token >= 0
        self._weights = self._weights + weights.sum(axis=0)
        self._n_frames += len(weights)

    def _end_run(self) -> None:
        if self._token >= 0:
            soft_token = self._weights / self._n_frames @ self._table
            self._held_back = [*self._held_back, soft_token]
        self._token = -1
        self._weights = 0.0
        self._n_frames = 0

    def _take_certain(self) -> np.ndarray:
        """(T, D): all soft tokens, unless the utterance may still be a noise."""
        taken: list[np.ndarray] = []
        if self._n_runs > MAX_DOUBTFUL_RUNS or self._max_probability >= CERTAIN:
            taken = self._held_back
            self._held_back = []
        return np.array(taken, np.float32).reshape(len(taken), self._table.shape[1])


class PooledReader:
    """A pooled utterance, which comes in one piece: similar neighbours are merged."""

    def __init__(self, size: int, cosine: float | None) -> None:
        self._no_rows = np.zeros((0, size), np.float32)
        self._cosine = cosine

    def push(self, soft_tokens: np.ndarray) -> np.ndarray:
        """(T, D) -> (T', D)."""
        return merge_similar(soft_tokens, self._cosine)

    def finish(self) -> np.ndarray:
        """(0, D): there is no rest."""
        return self._no_rows


Reader = CtcReader | PooledReader


def make_reader(readout: Readout, table: np.ndarray) -> Reader:
    """What reads one utterance; table (K, D) float32."""
    if readout.kind == "ctc":
        return CtcReader(table, readout.scale)
    return PooledReader(table.shape[1], readout.merge_cosine)


def collapse(frames: np.ndarray, table: np.ndarray, scale: float) -> np.ndarray:
    """A whole utterance by CtcReader: (N, D + 1) frames -> (T, D)."""
    reader = CtcReader(table, scale)
    return np.concatenate([reader.push(frames), reader.finish()])


def merge_similar(soft_tokens: np.ndarray, cosine: float | None) -> np.ndarray:
    """(T, D) -> (T', D): runs of neighbours more similar than `cosine` become their mean.

    A word that takes four of the projector's T places is one token to the LLM, as it is in text.
    """
    if cosine is None or len(soft_tokens) < 2:
        return soft_tokens
    unit = soft_tokens / np.linalg.norm(soft_tokens, axis=1, keepdims=True).clip(1e-9)
    differs = (unit[1:] * unit[:-1]).sum(axis=1) < cosine
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    lengths = np.diff([*starts, len(soft_tokens)])
    return np.add.reduceat(soft_tokens, starts, axis=0) / lengths[:, None].astype(np.float32)
