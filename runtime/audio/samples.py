"""Recordings of any format, rate and channels to checked float32 mono at the encoder's rate.

decoding.py reads a file, or refuses it if it is not whole; channels.py mixes its channels.
`check_audio` is also for arrays that an embedder passes in. Nothing here records from a
microphone, finds the speech in a recording or computes features.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from tiny_align.runtime.audio import channels, levels
from tiny_align.runtime.audio.decoding import decode, file_name
from tiny_align.runtime.errors import AudioError

log = logging.getLogger(__name__)

MIN_SECONDS = 0.1
SILENCE_DB = -60.0  # dBFS: a full-scale square wave is 0
SILENCE_FRAME_MS = 25
MAX_PEAK = 16.0  # float samples belong in [-1, 1]; beyond this they are integers in disguise
END_SLACK_S = 0.5  # rounded time marks may point this far past the end of a file


@dataclass(frozen=True)
class Recording:
    """The samples of a file, and what its owner should know about it."""

    samples: np.ndarray  # (S,) float32
    notes: tuple[str, ...]  # each begins with the file's name


# --- files ---


def read_recording(path: Path | str, sample_rate: int, max_s: float | None = None) -> Recording:
    """Read the whole of a file (WAV, FLAC, OGG, MP3 and whatever else libsndfile reads).

    Args:
        path: the file, a pipe, or "-" for standard input.
        sample_rate: Hz wanted; other rates are resampled (soxr, HQ).
        max_s: longest recording to accept, seconds; None: any.

    Raises:
        AudioError: no such file, not audio, cut off, or refused by `check_audio`.
    """
    return _read(Path(path), sample_rate, 0.0, None, max_s)


def read_audio(path: Path | str, sample_rate: int, max_s: float | None = None) -> np.ndarray:
    """Return `read_recording`'s samples, (S,) float32 at `sample_rate`; log its notes."""
    return _log_notes(read_recording(path, sample_rate, max_s))


def read_segment(
    path: Path | str,
    sample_rate: int,
    start_s: float,
    end_s: float | None,
    max_s: float | None = None,
) -> np.ndarray:
    """Read the part of a file from `start_s` to `end_s` seconds (None: to the end), no more.

    Returns:
        (S,) float32 at `sample_rate`, its channels mixed; notes are logged.

    Raises:
        AudioError: as `read_recording`, and for a segment that is empty or not in the file; an end
            at most END_SLACK_S past the end of the file is taken as the end.
    """
    return _log_notes(_read(Path(path), sample_rate, start_s, end_s, max_s))


def _log_notes(recording: Recording) -> np.ndarray:
    for note in recording.notes:
        log.warning("%s", note)
    return recording.samples


def _read(
    path: Path, sample_rate: int, start_s: float, end_s: float | None, max_s: float | None
) -> Recording:
    is_whole = start_s == 0.0 and end_s is None
    name = file_name(path) if is_whole else f"{path} [{start_s} s to {end_s} s]"

    def bounds(n_samples: int, rate: int) -> tuple[int, int]:
        if is_whole:
            first, last = 0, n_samples
        else:
            first, last = _segment_bounds(n_samples, rate, name, start_s, end_s)
        _check_seconds((last - first) / rate, name, max_s)  # before decoding what may be hours
        return first, last

    decoded = decode(path, bounds)
    _check_values(decoded.samples, name)
    mono, notes = channels.mix(decoded.samples, decoded.sample_rate)
    audio = soxr.resample(mono, decoded.sample_rate, sample_rate, quality="HQ")
    check_audio(audio, sample_rate, name, max_s)
    if not decoded.has_length:
        notes.append(
            "its header does not say how long it is: read to its end, "
            "a part cut off could not be noticed"
        )
    notes += levels.notes(mono, decoded.sample_rate)
    return Recording(audio, tuple(f"{name}: {note}" for note in notes))


def _segment_bounds(
    n_samples: int, rate: int, name: str, start_s: float, end_s: float | None
) -> tuple[int, int]:
    """First sample of a segment and the one after its last, at the file's rate."""
    length_s = n_samples / rate
    end = length_s if end_s is None else end_s
    if not 0 <= start_s < end:  # NaN fails too
        raise AudioError(
            f"{name}: is not a segment; expected 0 <= start < end in a file of {length_s:.2f} s."
        )
    if start_s >= length_s or end > length_s + END_SLACK_S:
        raise AudioError(
            f"{name}: reaches past the end, the file lasts {length_s:.2f} s; "
            "correct the time marks."
        )
    return round(start_s * rate), min(round(end * rate), n_samples)


# --- arrays ---


def check_audio(
    audio: np.ndarray, sample_rate: int, name: str = "audio", max_s: float | None = None
) -> None:
    """Accept (S,) float32 samples in [-1, 1] that are not silent.

    Args:
        audio: the samples.
        sample_rate: their rate, Hz.
        name: what the message calls them: a path, "microphone", ...
        max_s: longest accepted, seconds; None: any.

    Raises:
        AudioError: another type or shape, empty, NaN or infinite samples, out of range, too short
            or long, silence.
    """
    _check_array(audio, name)
    _check_seconds(len(audio) / sample_rate, name, max_s)
    _check_values(audio, name)
    loudest_db = levels.frame_levels(audio, sample_rate, SILENCE_FRAME_MS).max()
    if loudest_db < SILENCE_DB:
        raise AudioError(
            f"{name}: nothing was heard, the loudest {SILENCE_FRAME_MS} ms are at "
            f"{loudest_db:.0f} dBFS, expected at least {SILENCE_DB:.0f}; "
            "check that the microphone is on, unmuted and selected."
        )


def check_chunk(chunk: np.ndarray) -> None:
    """Accept a piece of a stream: (S,) float32 samples in [-1, 1], of any number and level.

    Raises:
        AudioError: another type or shape, NaN or infinite samples, out of range.
    """
    is_array = isinstance(chunk, np.ndarray)
    if not is_array or chunk.ndim != 1 or chunk.dtype != np.float32:
        got = f"{chunk.dtype} {chunk.shape}" if is_array else type(chunk).__name__
        raise AudioError(f"a chunk must be a float32 array of shape (S,), got {got}: convert it")
    if len(chunk):
        _check_values(chunk, "a chunk")


def _check_array(audio: np.ndarray, name: str) -> None:
    expected = "expected a one-dimensional float32 numpy array in [-1, 1]"
    if not isinstance(audio, np.ndarray):
        raise AudioError(
            f"{name}: got {type(audio).__name__}, {expected}; use np.asarray(samples, np.float32)."
        )
    if audio.dtype != np.float32:
        remedy = "use .astype(np.float32)"
        if np.issubdtype(audio.dtype, np.integer):
            remedy = f"divide by {np.iinfo(audio.dtype).max + 1} as float32"
        raise AudioError(f"{name}: got {audio.dtype} samples, {expected}; {remedy}.")
    if audio.ndim != 1:
        raise AudioError(f"{name}: got shape {audio.shape}, {expected}; average the channels.")


def _check_seconds(seconds: float, name: str, max_s: float | None) -> None:
    if seconds == 0:
        raise AudioError(f"{name}: is empty, it holds no samples; record it again.")
    if seconds < MIN_SECONDS:
        raise AudioError(
            f"{name}: lasts {seconds:.3f} s, expected at least {MIN_SECONDS} s; "
            "record a longer one."
        )
    if max_s is not None and seconds > max_s:
        raise AudioError(
            f"{name}: lasts {seconds:.2f} s, expected at most {max_s:g} s; "
            "cut it into shorter parts."
        )


def _check_values(audio: np.ndarray, name: str) -> None:
    peak = np.abs(audio).max()  # NaN if there is one
    if not np.isfinite(peak):
        raise AudioError(
            f"{name}: has NaN or infinite samples; expected values in [-1, 1], record it again."
        )
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: samples reach {peak:.0f}, expected [-1, 1]; divide 16-bit samples by 32768."
        )
