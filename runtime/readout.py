"""From what the projector gives to what the LLM reads: runs of the same become one soft token.

A bundle's projector either pools an utterance to T soft tokens, of which neighbours that are alike are merged, or
gives one vector per moment and a blank's logit, which are read as CTC reads them. Its manifest says which. A reader
takes the output in pieces, and gives each soft token as soon as nothing that follows can change it.
"""

from dataclasses import dataclass

import numpy as np

FEW, SURE = (
    2,
    0.7,
)  # so few tokens, none of them this likely in any frame, are a noise that was taken for a word


@dataclass(frozen=True)
class Readout:
    """How the projector's output is read, in the bundle's manifest."""

    kind: str  # "ctc" or "pooled"
    scale: float = (
        1.0  # "ctc": of a vector's product with a token's embedding, to give the token's logit
    )
    merge_cosine: float | None = (
        None  # "pooled": neighbours more alike than this become one; None: they stay
    )


def ctc_scale(table: np.ndarray) -> float:
    """The scale that gives a vector of unit variance logits of unit variance; table (K, D)."""
    return float(1 / (table.astype(np.float32).std() * np.sqrt(table.shape[1])))


class CtcReader:
    """Greedy CTC over the embedding table: every run of one token becomes that token's expected embedding.

    Nothing comes out where nothing was said, or so little and so doubtful that it was a noise. A copy (copy.copy) goes
    on by itself: no value is changed in place.
    """

    def __init__(self, table: np.ndarray, scale: float):
        """table: (K, D) float32, the speech vocabulary as the LLM sees it."""
        self._table, self._scale = table, np.float32(scale)
        self._token, self._weights, self._length = (
            -1,
            0.0,
            0,
        )  # of the run that goes on: its token, summed weights, frames
        self._n_runs, self._likely = (
            0,
            0.0,
        )  # so far; the most likely token's probability in any frame
        self._held: list[
            np.ndarray
        ] = []  # soft tokens of runs that are over, while they are few and doubtful

    def push(self, frames: np.ndarray) -> np.ndarray:
        """(N, D + 1) float32, the last column being the blank's logit -> (T', D) float32, what is certain now."""
        if len(frames) and len(
            self._table
        ):  # a large vocabulary may have no token that anything was trained on yet
            best, weights = self._read(frames)
            edges = [0, *(np.flatnonzero(best[1:] != best[:-1]) + 1), len(best)]
            for start, end in zip(edges, edges[1:]):
                self._go_on(int(best[start]), weights[start:end])
        return self._given()

    def finish(self) -> np.ndarray:
        """(T', D): the rest; the next frame is another utterance's."""
        self._close()
        last = self._given()
        self.__init__(self._table, self._scale)
        return last

    def _read(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) best tokens, -1 for the blank, and (N, K) how much of each token a frame is."""
        logits = frames[:, :-1] @ self._table.T * self._scale  # (N, K)
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)  # 1 for the best
        total = weights.sum(axis=1, keepdims=True)
        likely = 1 / (
            total + np.exp((frames[:, -1:] - top).clip(max=80))
        )  # (N, 1) the best token's probability
        self._likely = max(self._likely, float(likely.max()))
        return np.where(top[:, 0] > frames[:, -1], logits.argmax(axis=1), -1), weights / total

    def _go_on(self, token: int, weights: np.ndarray) -> None:
        if token != self._token:
            self._close()
            self._token, self._n_runs = token, self._n_runs + (token >= 0)
        self._weights = self._weights + weights.sum(axis=0)
        self._length += len(weights)

    def _close(self) -> None:
        if self._token >= 0:
            self._held = [*self._held, self._weights / self._length @ self._table]
        self._token, self._weights, self._length = -1, 0.0, 0

    def _given(self) -> np.ndarray:
        given = [] if self._n_runs <= FEW and self._likely < SURE else self._held
        if given:
            self._held = []
        return np.array(given, np.float32).reshape(len(given), self._table.shape[1])


class PooledReader:
    """A pooled utterance, which comes in one piece: neighbours that are alike are merged."""

    def __init__(self, size: int, cosine: float | None):
        self._soft_tokens, self._cosine = np.zeros((0, size), np.float32), cosine

    def push(self, soft_tokens: np.ndarray) -> np.ndarray:
        """(T, D) -> (T', D)."""
        return merge_similar(soft_tokens, self._cosine)

    def finish(self) -> np.ndarray:
        return self._soft_tokens


def reader(readout: Readout, table: np.ndarray) -> CtcReader | PooledReader:
    """What reads one utterance; table (K, D) float32."""
    if readout.kind == "ctc":
        return CtcReader(table, readout.scale)
    return PooledReader(table.shape[1], readout.merge_cosine)


def collapse(frames: np.ndarray, table: np.ndarray, scale: float) -> np.ndarray:
    """A whole utterance by CtcReader: (N, D + 1) frames -> (T', D)."""
    reading = CtcReader(table, scale)
    return np.concatenate([reading.push(frames), reading.finish()])


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
