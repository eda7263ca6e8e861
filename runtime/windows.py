"""How speech is cut for the encoder: windows that overlap, the same in training, in use and while somebody speaks.

A window goes through encoder and projector by itself. Of what comes out, the margins at the cuts are dropped, because
there the encoder saw too little of one side; what remains stands side by side. An utterance that fits into one window
is never cut. Where a window begins and ends depends on the number of samples alone, and not on how they arrive.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowSpec:
    """In the bundle's manifest. A vector is one row of what the projector gives, 80 ms with the reference bundle."""

    n_vectors: int  # of a whole window
    margin: int  # vectors that are dropped at each cut
    vector_samples: int  # samples of audio per vector
    n_features: int  # encoder frames that a whole window gives

    def __post_init__(self):
        if not 0 < 2 * self.margin < self.n_vectors:
            raise ValueError(f"a window of {self.n_vectors} vectors cannot lose {self.margin} at both ends")

    @property
    def samples(self) -> int:
        return self.n_vectors * self.vector_samples

    @property
    def hop_samples(self) -> int:
        """From the beginning of a window to that of the next."""
        return (self.n_vectors - 2 * self.margin) * self.vector_samples

    def kept(self, first: bool, last: bool) -> slice:
        """Which of a window's vectors remain."""
        return slice(0 if first else self.margin, None if last else self.n_vectors - self.margin)

    def kept_of(self, n: int) -> list[slice]:
        """`kept` of each of an utterance's `n` windows."""
        return [self.kept(i == 0, i == n - 1) for i in range(n)]

    def split(self, features: np.ndarray) -> list[np.ndarray]:
        """Features (N, Da) of all windows, one after another -> those of each."""
        return np.split(features, range(self.n_features, len(features), self.n_features))


class Cutter:
    """Audio that arrives in pieces of any size -> windows of it, each as soon as it is whole and not the last."""

    def __init__(self, spec: WindowSpec | None):
        """`spec` None: one window, which is the whole utterance."""
        self.spec, self.n_samples = spec, 0  # samples so far
        self._pieces: list[np.ndarray] = []  # from the beginning of the present window on
        self._held, self._first = 0, True  # samples in the pieces; whether no window has been cut yet

    def push(self, audio: np.ndarray) -> list[tuple[np.ndarray, slice]]:
        """(S,) float32 -> the windows that it completes, and which of their vectors remain."""
        self._pieces.append(audio.copy())  # the caller may use the array again
        self._held += len(audio)
        self.n_samples += len(audio)
        if self.spec is None or self._held <= self.spec.samples:  # this window may be the last
            return []
        held, windows = np.concatenate(self._pieces), []
        while len(held) > self.spec.samples:
            windows.append((held[: self.spec.samples], self.spec.kept(self._first, last=False)))
            held, self._first = held[self.spec.hop_samples :], False
        self._pieces, self._held = [held.copy()], len(held)
        return windows

    def finish(self) -> tuple[np.ndarray, slice]:
        """The last window, and which of its vectors remain."""
        held = np.concatenate([np.zeros(0, np.float32), *self._pieces])
        return held, slice(None) if self.spec is None else self.spec.kept(self._first, last=True)


def cut(audio: np.ndarray, spec: WindowSpec | None) -> list[tuple[np.ndarray, slice]]:
    """(S,) -> all windows of an utterance, and which vectors of each remain."""
    cutter = Cutter(spec)
    return [*cutter.push(audio), cutter.finish()]
