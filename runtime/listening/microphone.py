"""A microphone (sounddevice): blocks of audio as they arrive, or one recording until told to stop.

The callback never waits: audio that is not read within BACKLOG_S is dropped and reported. If a
microphone does not have the wanted rate, it records at its own and is resampled.
"""

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import soxr

from tiny_align.runtime.errors import AudioError

BLOCK_S = 0.032
BACKLOG_S = 20.0  # of audio buffered for a reader that is late
GONE_S = 2.0  # without a block: the microphone was unplugged
POLL_S = 0.1


@dataclass(frozen=True)
class Notice:
    """Something the user should know about the audio."""

    text: str
    dropped_s: float = 0.0  # of audio that was lost


class Microphone:
    """Mono float32 at `sample_rate`; a context manager.

    Iterate to read until `stop`, or `record` one utterance.
    """

    live = True  # time passes whether it is read or not

    def __init__(self, sample_rate: int, device: str | None = None):
        """Open the device.

        Args:
            sample_rate: Hz wanted.
            device: its number or a part of its name; None: the system's.

        Raises:
            AudioError: no PortAudio, no such device, or one that does not record.
        """
        self.sample_rate = sample_rate
        self._stopped = False
        # Each block (S,) with the number of samples that were lost before it.
        self._blocks: queue.Queue[tuple[np.ndarray, int]] = queue.Queue(round(BACKLOG_S / BLOCK_S))
        self._n_dropped = 0  # samples since the last block in the queue
        self._stream, self._rate = _open_stream(sample_rate, device, self._on_block)

    def _on_block(self, block: np.ndarray, _frames: int, _time: Any, status: Any) -> None:
        """Queue a block (S, 1). Runs on PortAudio's thread: never waits, never raises."""
        overflowed = status and status.input_overflow
        n_lost = self._n_dropped + (len(block) if overflowed else 0)
        try:
            self._blocks.put_nowait((block[:, 0].copy(), n_lost))
            self._n_dropped = 0
        except queue.Full:
            self._n_dropped = n_lost + len(block)

    def record(self, wait: Callable[[], object]) -> np.ndarray:
        """Record until `wait()` returns, BACKLOG_S at most: (S,) float32."""
        self._blocks.queue.clear()
        self._start()
        try:
            wait()
        finally:
            self._stream.stop()
        blocks = [np.zeros(0, np.float32)]
        for _ in range(self._blocks.qsize()):
            block, _ = self._blocks.get_nowait()
            blocks.append(block)
        return soxr.resample(np.concatenate(blocks), self._rate, self.sample_rate)

    def __iter__(self) -> Iterator[np.ndarray | Notice]:
        """Give blocks (S,) float32 until `stop`, and notices about them.

        Raises:
            AudioError: the microphone is gone.
        """
        if self._rate != self.sample_rate:
            yield Notice(
                f"the microphone records at {self._rate} Hz: resampled to {self.sample_rate} Hz"
            )
        resampler = soxr.ResampleStream(self._rate, self.sample_rate, 1, dtype="float32")
        self._start()
        asked_s = time.monotonic()
        while not self._stopped:
            try:
                block, n_lost = self._blocks.get(timeout=POLL_S)
            except queue.Empty:
                if not self._stream.active or time.monotonic() - asked_s > GONE_S:
                    raise AudioError(
                        "the microphone is gone: plug it in and start again, or give --device"
                    ) from None
                continue
            if n_lost:
                lost_s = n_lost / self._rate
                yield Notice(
                    f"{lost_s:.1f} s of audio dropped: this machine or its reader is too slow",
                    lost_s,
                )
            yield resampler.resample_chunk(block)
            asked_s = time.monotonic()

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

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _sounddevice() -> ModuleType:
    try:
        import sounddevice
    except OSError as error:  # its library, not the package
        raise AudioError(
            f"{error}: install PortAudio (Debian: libportaudio2), or give recordings"
        ) from error
    return sounddevice


def _open_stream(
    sample_rate: int, device: str | None, on_block: Callable[..., None]
) -> tuple[Any, int]:
    """A sounddevice.InputStream and its rate in Hz: the wanted one, or the device's own."""
    sounddevice = _sounddevice()
    device_id = int(device) if device and device.isdigit() else device
    refusals = (sounddevice.PortAudioError, ValueError)

    def open_at(rate: int) -> Any:
        return sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(rate * BLOCK_S),
            channels=1,
            dtype="float32",
            device=device_id,
            callback=on_block,
        )

    try:
        return open_at(sample_rate), sample_rate
    except refusals:
        pass  # try its own rate
    try:
        own_rate = round(sounddevice.query_devices(device_id, "input")["default_samplerate"])
        return open_at(own_rate), own_rate
    except refusals as error:
        microphones = [d["name"] for d in sounddevice.query_devices() if d["max_input_channels"]]
        known = ", ".join(microphones) or "none"
        raise AudioError(
            f"no microphone {device_id or 'of the system'!r} ({error}); known: {known}. "
            "Give --device, or recordings"
        ) from error
