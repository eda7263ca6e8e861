"""How speech is cut for the encoder: windows that overlap, the same in training, in use and while somebody speaks.

A window goes through encoder and projector by itself. Of what comes out, the margins at the cuts are dropped, because
there the encoder saw too little of one side; what remains stands side by side. An utterance that fits into one window
is never cut. Where a window begins and ends depends on the audio alone, and not on how it arrives.
"""

from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.audio.pauses import Pauses


@dataclass(frozen=True)
class WindowSpec:
    """In the bundle's manifest. A vector is one row of what the projector gives, 80 ms with the reference bundle."""

    n_vectors: int  # of a whole window
    margin: int  # vectors that are dropped at each cut
    vector_samples: int  # samples of audio per vector
    n_features: int  # encoder frames that a whole window gives

    def __post_init__(self):
        if not 0 < 2 * self.margin < self.n_vectors:
            raise ValueError(
                f"a window of {self.n_vectors} vectors cannot lose {self.margin} at both ends"
            )

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

    def keep_slices(self, n: int) -> list[slice]:
        """`kept` of each of an utterance's `n` windows."""
        return [self.kept(i == 0, i == n - 1) for i in range(n)]

    def split(self, features: np.ndarray) -> list[np.ndarray]:
        """Features (N, Da) of all windows, one after another -> those of each."""
        return np.split(features, range(self.n_features, len(features), self.n_features))


class Cutter:
    """Audio that arrives in pieces of any size -> windows of it, each as soon as it is whole and not the last."""

    def __init__(self, spec: WindowSpec | None, sample_rate: int | None = None):
        """
        Args:
            spec: None: one window, which is the whole utterance.
            sample_rate: Hz, to leave long pauses out (pauses.py); None: they stay.
        """
        self.spec, self.n_samples = spec, 0  # samples so far, pauses included
        self._pauses = Pauses(sample_rate) if sample_rate else None
        self._waiting: list[np.ndarray] = []  # pieces that come after the kept audio
        self._n_waiting = 0  # samples in them
        self._kept = np.zeros(0, np.float32)  # from the beginning of the present window on
        self._first = True  # whether no window has been cut yet

    def push(self, audio: np.ndarray) -> list[tuple[np.ndarray, slice]]:
        """(S,) float32 -> the windows that it completes, and which of their vectors remain."""
        self._waiting.append(audio.copy())  # the caller may use the array again
        self._n_waiting += len(audio)
        self.n_samples += len(audio)
        windows = []
        while (
            self.spec and self._n_waiting > self._n_wanted()
        ):  # more follows: it is not the last window
            self._take(self._n_wanted())
            if len(self._kept) >= self.spec.samples:
                windows.append(
                    (self._kept[: self.spec.samples], self.spec.kept(self._first, last=False))
                )
                self._kept, self._first = self._kept[self.spec.hop_samples :], False
        return windows

    def finish(self) -> list[tuple[np.ndarray, slice]]:
        """The last windows, and which of their vectors remain, if the audio ends here; nothing is changed."""
        waiting = np.concatenate([self._kept[:0], *self._waiting])
        rest = self._pauses.shorten(waiting, last=True)[0] if self._pauses else waiting
        audio, first, windows = np.concatenate([self._kept, rest]), self._first, []
        if not len(audio):
            audio = (
                waiting  # no sound stands out in it: the projector tells whether there is a word
            )
        while self.spec and len(audio) > self.spec.samples:
            windows.append((audio[: self.spec.samples], self.spec.kept(first, last=False)))
            audio, first = audio[self.spec.hop_samples :], False
        return [*windows, (audio, self.spec.kept(first, last=True) if self.spec else slice(None))]

    def _n_wanted(self) -> int:
        """How many waiting samples are looked at together: what the window lacks."""
        missing = self.spec.samples - len(self._kept)
        return self._pauses.block_samples(missing) if self._pauses else missing

    def _take(self, n: int) -> None:
        """Of the first `n` waiting samples, what is certain joins the window or is left out."""
        waiting = (
            self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        )  # hours, uncopied
        kept, n_judged = waiting[:n], n
        if self._pauses:
            kept, n_judged, self._pauses = self._pauses.shorten(waiting[:n], last=False)
        self._kept = np.concatenate([self._kept, kept])
        self._waiting, self._n_waiting = [waiting[n_judged:]], len(waiting) - n_judged


def cut(
    audio: np.ndarray, spec: WindowSpec | None, sample_rate: int | None = None
) -> list[tuple[np.ndarray, slice]]:
    """(S,) -> all windows of an utterance, and which vectors of each remain."""
    cutter = Cutter(spec, sample_rate)
    return [*cutter.push(audio), *cutter.finish()]
