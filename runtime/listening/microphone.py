"""A microphone (sounddevice): blocks of audio while a person speaks, or all that is said until they say so.

What nobody takes is dropped after BACKLOG_S and said; the callback never waits. A microphone that lacks the rate that
is wanted records at its own and is resampled.
"""

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soxr

from tiny_align.runtime.errors import AudioError

BLOCK_S = 0.032
BACKLOG_S = 20.0  # audio kept for a reader that is late
GONE_S = 2.0  # without a block: the microphone has been pulled out
POLL_S = 0.1


@dataclass(frozen=True)
class Notice:
    """Something a person should know about the audio."""

    text: str
    dropped_s: float = 0.0  # audio that was lost


class Microphone:
    """Mono float32 at `sample_rate`; a context manager. Iterate to listen on, or `record` one utterance."""

    live = True  # time passes whether it is read or not

    def __init__(self, sample_rate: int, device: str | None = None):
        """
        Args:
            sample_rate: Hz wanted.
            device: its number or a part of its name; None: the system's.
        Raises:
            AudioError: no PortAudio, no such device, or one that does not record.
        """
        self.sample_rate, self._stopped = sample_rate, False
        self._blocks: queue.Queue = queue.Queue(round(BACKLOG_S / BLOCK_S))
        self._dropped = 0  # samples
        self._stream, self._rate = _opened(sample_rate, device, self._take)

    def _take(self, block: np.ndarray, _frames, _time, status) -> None:
        """PortAudio's thread: never waits, never raises."""
        lost = self._dropped + (len(block) if status and status.input_overflow else 0)
        try:
            self._blocks.put_nowait((block[:, 0].copy(), lost))
            self._dropped = 0
        except queue.Full:
            self._dropped = lost + len(block)

    def record(self, wait) -> np.ndarray:
        """(S,) float32: what is said until `wait()` returns, BACKLOG_S at most."""
        self._blocks.queue.clear()
        self._start()
        try:
            wait()
        finally:
            self._stream.stop()
        taken = [self._blocks.get_nowait()[0] for _ in range(self._blocks.qsize())]
        return soxr.resample(
            np.concatenate([np.zeros(0, np.float32), *taken]), self._rate, self.sample_rate
        )

    def __iter__(self) -> Iterator[np.ndarray | Notice]:
        """Blocks (S,) float32 until `stop`, and what there is to say about them.

        Raises:
            AudioError: the microphone is gone.
        """
        if self._rate != self.sample_rate:
            yield Notice(
                f"the microphone records at {self._rate} Hz: resampled to {self.sample_rate} Hz"
            )
        resampler = soxr.ResampleStream(self._rate, self.sample_rate, 1, dtype="float32")
        self._start()
        while (item := self._next()) is not None:
            block, lost = item
            if lost:
                seconds = lost / self._rate
                yield Notice(
                    f"{seconds:.1f} s of audio dropped: this machine or its reader is too slow",
                    seconds,
                )
            yield resampler.resample_chunk(block)

    def _next(self) -> tuple[np.ndarray, int] | None:
        """The next block; None once stopped."""
        began = time.monotonic()
        while not self._stopped:
            try:
                return self._blocks.get(timeout=POLL_S)
            except queue.Empty:
                if not self._stream.active or time.monotonic() - began > GONE_S:
                    raise AudioError(
                        "the microphone is gone: plug it in and start again, or give --device"
                    ) from None
        return None

    def _start(self) -> None:
        try:
            self._stream.start()
        except _sounddevice().PortAudioError as error:
            raise AudioError(
                f"the microphone does not start ({error}): close what else uses it"
            ) from error

    def stop(self) -> None:
        """End an iteration within POLL_S; from any thread."""
        self._stopped = True

    def __enter__(self) -> "Microphone":
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()


def _sounddevice():
    try:
        import sounddevice
    except OSError as error:  # its library, not the package
        raise AudioError(
            f"{error}: install PortAudio (Debian: libportaudio2), or give recordings"
        ) from error
    return sounddevice


def _opened(sample_rate: int, device, take) -> tuple:
    """The stream and its rate: the one that is wanted, or the device's own."""
    sounddevice = _sounddevice()
    device = int(device) if device and device.isdigit() else device
    refused = (sounddevice.PortAudioError, ValueError)
    try:
        return _stream(sounddevice, sample_rate, device, take), sample_rate
    except refused:
        pass  # its own rate, then
    try:
        own = round(sounddevice.query_devices(device, "input")["default_samplerate"])
        return _stream(sounddevice, own, device, take), own
    except refused as error:
        known = (
            ", ".join(d["name"] for d in sounddevice.query_devices() if d["max_input_channels"])
            or "none"
        )
        raise AudioError(
            f"no microphone {device or 'of the system'!r} ({error}); known: {known}. Give --device, or recordings"
        ) from error


def _stream(sounddevice, rate: int, device, take):
    return sounddevice.InputStream(
        samplerate=rate,
        blocksize=round(rate * BLOCK_S),
        channels=1,
        dtype="float32",
        device=device,
        callback=take,
    )
