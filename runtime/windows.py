"""How speech is cut for the encoder: overlapping windows, the same in training and in a stream.

A window goes through encoder and projector by itself. At each cut a margin of its vectors is
discarded, because there the encoder saw too little of one side; what remains stands side by side.
An utterance that fits into one window is never cut. Where a window begins and ends depends on the
audio alone, and not on how it arrives.
"""

from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.audio.pauses import Pauses

Window = tuple[np.ndarray, slice]  # (S,) float32 audio, and which of its vectors remain


@dataclass(frozen=True)
class WindowSpec:
    """The sizes of windows, in the bundle's manifest.

    A vector is one row of the projector's output: 80 ms of audio with the reference bundle.
    """

    n_vectors: int  # of a whole window
    margin: int  # vectors that are discarded at each cut
    vector_samples: int  # samples of audio per vector
    n_features: int  # encoder frames of a whole window

    def __post_init__(self) -> None:
        if not 0 < 2 * self.margin < self.n_vectors:
            raise ValueError(
                f"a window of {self.n_vectors} vectors cannot lose {self.margin} at both ends"
            )

    @property
    def samples(self) -> int:
        """Samples of a whole window."""
        return self.n_vectors * self.vector_samples

    @property
    def hop_samples(self) -> int:
        """From the beginning of a window to that of the next."""
        return (self.n_vectors - 2 * self.margin) * self.vector_samples

    def keep_slice(self, first: bool, last: bool) -> slice:
        """Which of a window's vectors remain."""
        start = 0 if first else self.margin
        end = None if last else self.n_vectors - self.margin
        return slice(start, end)

    def keep_slices(self, n: int) -> list[slice]:
        """`keep_slice` of each of an utterance's `n` windows."""
        return [self.keep_slice(i == 0, i == n - 1) for i in range(n)]

    def split(self, features: np.ndarray) -> list[np.ndarray]:
        """Features (N, Da) of all windows, one after another -> those of each."""
        return np.split(features, range(self.n_features, len(features), self.n_features))


class Cutter:
    """Audio in pieces of any size -> windows, each as soon as it is complete and not the last."""

    def __init__(self, spec: WindowSpec | None, sample_rate: int | None = None) -> None:
        """
        Args:
            spec: None: one window, which is the whole utterance.
            sample_rate: Hz, to leave long pauses out (pauses.py); None: they stay.
        """
        self.spec = spec
        self.n_samples = 0  # so far, pauses included
        self._pauses = Pauses(sample_rate) if sample_rate else None
        self._audio = np.zeros(0, np.float32)  # from the beginning of the present window on
        self._waiting: list[np.ndarray] = []  # the pieces after it, pauses not left out yet
        self._n_waiting = 0  # samples in them
        self._first = True  # whether no window has been cut yet

    def push(self, audio: np.ndarray) -> list[Window]:
        """(S,) float32 -> the windows that it completes."""
        self._waiting.append(audio.copy())  # the caller may use the array again
        self._n_waiting += len(audio)
        self.n_samples += len(audio)
        if self.spec is None:
            return []
        windows: list[Window] = []
        # while more follows: the window is not the last
        while self._n_waiting > self._n_wanted(self.spec):
            self._take(self._n_wanted(self.spec))
            if len(self._audio) >= self.spec.samples:
                keep = self.spec.keep_slice(self._first, last=False)
                windows.append((self._audio[: self.spec.samples], keep))
                self._audio = self._audio[self.spec.hop_samples :]
                self._first = False
        return windows

    def finish(self) -> list[Window]:
        """The last windows, at least one, if the audio ends here; nothing is changed."""
        waiting = np.concatenate([self._audio[:0], *self._waiting])
        rest = waiting
        if self._pauses:
            rest = self._pauses.shorten(waiting, last=True)[0]
        audio = np.concatenate([self._audio, rest])
        if not len(audio):
            audio = waiting  # no sound stands out: the projector tells whether there is a word
        if self.spec is None:
            return [(audio, slice(None))]
        first = self._first
        windows: list[Window] = []
        while len(audio) > self.spec.samples:
            keep = self.spec.keep_slice(first, last=False)
            windows.append((audio[: self.spec.samples], keep))
            audio = audio[self.spec.hop_samples :]
            first = False
        windows.append((audio, self.spec.keep_slice(first, last=True)))
        return windows

    def _n_wanted(self, spec: WindowSpec) -> int:
        """How many waiting samples are looked at together: what the window lacks."""
        missing = spec.samples - len(self._audio)
        return self._pauses.block_samples(missing) if self._pauses else missing

    def _take(self, n: int) -> None:
        """Of the first `n` waiting samples, what is certain joins the window or is left out."""
        # hours of audio in one piece are not copied
        waiting = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        speech = waiting[:n]
        n_taken = n
        if self._pauses:
            speech, n_taken, self._pauses = self._pauses.shorten(waiting[:n], last=False)
        self._audio = np.concatenate([self._audio, speech])
        self._waiting = [waiting[n_taken:]]
        self._n_waiting = len(waiting) - n_taken


def cut(audio: np.ndarray, spec: WindowSpec | None, sample_rate: int | None = None) -> list[Window]:
    """(S,) -> all windows of an utterance."""
    cutter = Cutter(spec, sample_rate)
    return [*cutter.push(audio), *cutter.finish()]
