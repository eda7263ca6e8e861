"""A microphone, recorded between two presses of Enter (sounddevice)."""

import numpy as np

from tiny_align.runtime.errors import AudioError

MOST_S = 20.0


class Microphone:
    """Records mono float32; a context manager."""

    def __init__(self, sample_rate: int, device: str | int | None = None):
        """Raises AudioError: no such device, one that cannot record at `sample_rate`, or no PortAudio."""
        try:
            import sounddevice
        except OSError as error:  # its library, not the package
            raise AudioError(f"{error}: install PortAudio (Debian: libportaudio2), or give --data") from error

        self.sample_rate, self._chunks = sample_rate, []
        try:
            self._stream = sounddevice.InputStream(
                samplerate=sample_rate, channels=1, dtype="float32", device=device, callback=self._take
            )
        except (sounddevice.PortAudioError, ValueError) as error:
            known = ", ".join(d["name"] for d in sounddevice.query_devices() if d["max_input_channels"]) or "none"
            raise AudioError(
                f"no microphone {device!r} at {sample_rate} Hz ({error}); known: {known}. Give --device, or record "
                "elsewhere and give --data"
            ) from error

    def _take(self, block: np.ndarray, _frames, _time, _status) -> None:
        if len(self._chunks) * len(block) < MOST_S * self.sample_rate:
            self._chunks.append(block[:, 0].copy())

    def record(self, wait) -> np.ndarray:
        """(S,) float32: what is said until `wait()` returns."""
        self._chunks = []
        self._stream.start()
        try:
            wait()
        finally:
            self._stream.stop()
        return np.concatenate([np.zeros(0, np.float32), *self._chunks])

    def __enter__(self) -> "Microphone":
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()
