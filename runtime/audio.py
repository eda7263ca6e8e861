"""Recordings: files of any rate, channels and format -> checked float32 mono at the rate the encoder wants.

`check_audio` is also for arrays that an embedder passes in. Nothing here records from a microphone,
finds the speech in a recording or computes features (features.py does).
"""

import contextlib
import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from tiny_align.runtime.errors import AudioError

MIN_SECONDS = 0.1
SILENCE_DB = -60.0  # dBFS: a full-scale square wave is 0
SILENCE_FRAME_MS = 25
MAX_PEAK = 16.0  # float samples belong in [-1, 1]; beyond this they are integers in disguise
END_SLACK_S = 0.5  # rounded time marks may point this far past the end of a file
UNKNOWN_FRAMES = 2**62  # libsndfile's count for a FLAC stream that was written to a pipe
STREAMED_BYTES = 0x7FFF_0000  # a WAV data size from here up is a placeholder: the writer had a pipe, not a file


def read_audio(path: Path | str, sample_rate: int, max_s: float | None = None) -> np.ndarray:
    """The whole of a file (WAV, FLAC, OGG, MP3 and whatever else libsndfile knows).

    Args:
        path: the file.
        sample_rate: Hz wanted; other rates are resampled (soxr, HQ).
        max_s: longest recording to accept, seconds; None: any.

    Returns:
        (S,) float32 at `sample_rate`, the channels averaged.

    Raises:
        AudioError: no such file, not audio, cut off, or refused by `check_audio`.
    """
    return _read(Path(path), sample_rate, 0.0, None, max_s)


def read_segment(
    path: Path | str, sample_rate: int, start_s: float, end_s: float | None, max_s: float | None = None
) -> np.ndarray:
    """The part of a file from `start_s` to `end_s` seconds (None: to the end); only that part is read.

    Returns:
        (S,) float32 at `sample_rate`, the channels averaged.

    Raises:
        AudioError: as `read_audio`, and for a segment that is empty or not in the file; an end at most
            END_SLACK_S past the end of the file is taken as the end.
    """
    return _read(Path(path), sample_rate, start_s, end_s, max_s)


def check_audio(audio: np.ndarray, sample_rate: int, name: str = "audio", max_s: float | None = None) -> None:
    """Accept (S,) float32 samples in [-1, 1] in which something can be heard.

    Args:
        audio: the samples.
        sample_rate: their rate, Hz.
        name: what the message calls them: a path, "microphone", ...
        max_s: longest accepted, seconds; None: any.

    Raises:
        AudioError: another type or shape, empty, NaN or infinite samples, out of range, too short or long, silence.
    """
    _check_array(audio, name)
    _check_seconds(len(audio) / sample_rate, name, max_s)
    _check_values(audio, name)
    _check_level(audio, sample_rate, name)


def check_chunk(chunk: np.ndarray) -> None:
    """Accept a piece of a stream: (S,) float32 samples in [-1, 1], of any number and level.

    Raises:
        AudioError: another type or shape, NaN or infinite samples, out of range.
    """
    if not isinstance(chunk, np.ndarray) or chunk.ndim != 1 or chunk.dtype != np.float32:
        given = f"{chunk.dtype} {chunk.shape}" if isinstance(chunk, np.ndarray) else type(chunk).__name__
        raise AudioError(f"a chunk must be a float32 array of shape (S,), given was {given}: convert it")
    if len(chunk):
        _check_values(chunk, "a chunk")


def _check_values(audio: np.ndarray, name: str) -> None:
    peak = np.abs(audio).max()  # NaN if there is one
    if not np.isfinite(peak):
        raise AudioError(f"{name}: has NaN or infinite samples; expected values in [-1, 1], record it again.")
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: samples reach {peak:.0f}, expected [-1, 1]; divide 16-bit samples by 32768.")


def _check_array(audio: np.ndarray, name: str) -> None:
    expected = "expected a one-dimensional float32 numpy array in [-1, 1]"
    if not isinstance(audio, np.ndarray):
        raise AudioError(f"{name}: got {type(audio).__name__}, {expected}; use np.asarray(samples, np.float32).")
    if audio.dtype != np.float32:
        integer = np.issubdtype(audio.dtype, np.integer)
        fix = f"divide by {np.iinfo(audio.dtype).max + 1} as float32" if integer else "use .astype(np.float32)"
        raise AudioError(f"{name}: got {audio.dtype} samples, {expected}; {fix}.")
    if audio.ndim != 1:
        raise AudioError(f"{name}: got shape {audio.shape}, {expected}; average the channels.")


def _check_seconds(seconds: float, name: str, max_s: float | None) -> None:
    if seconds == 0:
        raise AudioError(f"{name}: is empty, it holds no samples; record it again.")
    if seconds < MIN_SECONDS:
        raise AudioError(f"{name}: lasts {seconds:.3f} s, expected at least {MIN_SECONDS} s; record a longer one.")
    if max_s is not None and seconds > max_s:
        raise AudioError(f"{name}: lasts {seconds:.2f} s, expected at most {max_s:g} s; cut it into shorter parts.")


def _check_level(audio: np.ndarray, sample_rate: int, name: str) -> None:
    loudest = _loudest_db(audio, sample_rate)
    if loudest < SILENCE_DB:
        raise AudioError(
            f"{name}: nothing was heard, the loudest {SILENCE_FRAME_MS} ms are at {loudest:.0f} dBFS, expected "
            f"at least {SILENCE_DB:.0f}; check that the microphone is on, unmuted and selected."
        )


def _loudest_db(audio: np.ndarray, sample_rate: int) -> float:
    """RMS of the loudest frame in dBFS, -inf for digital silence; a constant offset is not sound."""
    length = sample_rate * SILENCE_FRAME_MS // 1000
    centred = audio - audio.mean()
    frames = centred[: len(audio) // length * length].reshape(-1, length)  # (n_frames, length)
    power = float((frames**2).mean(axis=1).max())
    return 10 * math.log10(power) if power > 0 else -math.inf


def _read(path: Path, sample_rate: int, start_s: float, end_s: float | None, max_s: float | None) -> np.ndarray:
    with _opened(path) as file:
        name = str(path) if (start_s, end_s) == (0.0, None) else f"{path} [{start_s} s to {end_s} s]"
        first, last = _bounds(file, name, start_s, end_s)
        _check_seconds((last - first) / file.samplerate, name, max_s)  # before decoding what may be hours
        mono = _decode(file, first, last - first, name)
        audio = soxr.resample(mono, file.samplerate, sample_rate, quality="HQ")
    check_audio(audio, sample_rate, name, max_s)
    return audio


@contextlib.contextmanager
def _opened(path: Path):
    """Yields a soundfile.SoundFile; whatever libsndfile has against the file becomes an AudioError."""
    _check_file(path)
    source = _source(path)
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw
        reason = getattr(error, "error_string", error)
        raise AudioError(f"{path}: is not audio we can read ({reason}); expected WAV, FLAC, OGG or MP3.") from error
    with file:
        if file.frames >= UNKNOWN_FRAMES:
            raise AudioError(f"{path}: its header does not say how long it is; convert it to WAV.")
        yield file


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise AudioError(f"{path}: is a folder, expected an audio file; give one of the files in it.")
    if not path.is_file():
        raise AudioError(f"{path}: no such file; check the path to the recording.")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: is an empty file (0 bytes), expected audio; record or copy it again.")


def _bounds(file: soundfile.SoundFile, name: str, start_s: float, end_s: float | None) -> tuple[int, int]:
    """First sample and the one after the last, at the file's rate."""
    length_s = file.frames / file.samplerate
    end = length_s if end_s is None else end_s
    if end_s is None and start_s == 0:
        return 0, file.frames
    if not 0 <= start_s < end:  # NaN fails too
        raise AudioError(f"{name}: is not a segment; expected 0 <= start < end in a file of {length_s:.2f} s.")
    if start_s >= length_s or end > length_s + END_SLACK_S:
        raise AudioError(f"{name}: reaches past the end, the file lasts {length_s:.2f} s; correct the time marks.")
    return round(start_s * file.samplerate), min(round(end * file.samplerate), file.frames)


def _decode(file: soundfile.SoundFile, first: int, n_samples: int, name: str) -> np.ndarray:
    """(n_samples,) float32 from `first` on, the channels averaged."""
    try:
        file.seek(first)
        samples = file.read(n_samples, dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.SoundFileError, MemoryError) as error:  # MemoryError: a header that claims hundreds of hours
        raise AudioError(f"{name}: is damaged or cut off ({error}); record or copy it again.") from error
    if len(samples) < n_samples and file.format != "MP3":  # MP3 lengths are estimates
        raise AudioError(f"{name}: is cut off, {len(samples)} of {n_samples} samples; record or copy it again.")
    return samples.mean(axis=1)


@dataclass(frozen=True)
class _WavData:
    """Where the samples of a WAV file are, according to its header and in truth."""

    size_at: int  # byte offset of the data chunk's size field
    byte_order: str  # struct's: "<" RIFF, ">" RIFX
    promised_bytes: int
    present_bytes: int
    chunk_follows: bool  # another chunk directly follows the size field: a size of 0 is the truth


def _source(path: Path) -> Path | io.BytesIO:
    """What libsndfile should open: the file, or a repaired copy of a WAV whose header was never completed.

    libsndfile reads a cut-off WAV as if it were whole, and one of data size 0 as empty.
    """
    with open(path, "rb") as file:
        wav = _wav_data(file)
    if wav is None or wav.present_bytes == 0:
        return path
    if wav.promised_bytes == 0 and not wav.chunk_follows:
        return _with_true_size(path, wav)
    if wav.present_bytes < wav.promised_bytes < STREAMED_BYTES:
        raise AudioError(
            f"{path}: is cut off, its header promises {wav.promised_bytes} bytes of samples and "
            f"{wav.present_bytes} are there; record or copy it again."
        )
    return path


def _wav_data(file: io.BufferedReader) -> _WavData | None:
    """Walk the chunks of a RIFF or RIFX file to its data; None: not WAV, or libsndfile's to complain about."""
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    form, _, kind = file.read(4), file.read(4), file.read(4)
    if form not in (b"RIFF", b"RIFX") or kind != b"WAVE":
        return None
    order = ">" if form == b"RIFX" else "<"
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack(order + "4sI", header)
        if name == b"data":
            at = file.tell()
            return _WavData(at - 4, order, size, total - at, _is_chunk(file.read(8), order, total - at))
        file.seek(size + size % 2, io.SEEK_CUR)
    return None


def _is_chunk(header: bytes, order: str, room_bytes: int) -> bool:
    """Whether these bytes are a chunk's name and a size that fits, not samples."""
    if len(header) < 8:
        return False
    name, size = struct.unpack(order + "4sI", header)
    return name.strip().isalnum() and size <= room_bytes - 8


def _with_true_size(path: Path, wav: _WavData) -> io.BytesIO:
    """The file in memory, its data chunk reaching to the end."""
    content = bytearray(path.read_bytes())
    struct.pack_into(wav.byte_order + "I", content, wav.size_at, wav.present_bytes)
    return io.BytesIO(content)
