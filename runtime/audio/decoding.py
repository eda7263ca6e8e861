"""A file, a pipe or standard input to its samples, by libsndfile.

Files that are cut off, damaged or in a format that libsndfile does not read are refused.
"""

import functools
import io
import mmap
import stat
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from tiny_align.runtime.audio.containers import CheckedFile, Piece, examine, foreign_format
from tiny_align.runtime.audio.streams import Bytes, cut_off
from tiny_align.runtime.errors import AudioError

STDIN = "-"
MAX_PIPE_BYTES = 2**31
MIN_SAMPLE_RATE = 4_000  # Hz: less is no speech
MAX_SAMPLE_RATE = 768_000  # Hz: a header that gives more is wrong
UNKNOWN_SAMPLES = 2**62  # libsndfile's count for a FLAC stream that was written to a pipe
BLOCK_SAMPLES = 2**18
EDGE_BYTES = 2**16
# Codecs that libsndfile reads from the beginning only.
SEQUENTIAL_CODECS = ("GSM", "G721", "G723", "NMS", "DWVW", "DPCM")
RAW_GSM = {"format": "RAW", "subtype": "GSM610", "samplerate": 8_000, "channels": 1}
CONVERT = "convert it, for example with `ffmpeg -i FILE out.wav`"


@dataclass(frozen=True)
class Decoded:
    samples: np.ndarray  # (S, C) float32
    sample_rate: int  # Hz, the file's own
    has_length: bool  # False: we cannot tell whether its end is missing


def decode(path: Path, bounds: Callable[[int, int], tuple[int, int]]) -> Decoded:
    """Decode a part of a file.

    Args:
        path: the file, a pipe, or "-" for standard input.
        bounds: (number of samples, their rate in Hz) -> the first sample to decode and the one
            after the last.

    Raises:
        AudioError: no such file, not audio, cut off or damaged; and what `bounds` raises.
    """
    name = file_name(path)
    data = _contents(path)
    is_file = isinstance(data, mmap.mmap)
    checked = _examine_file(path, _fingerprint(path, data)) if is_file else examine(data, name)
    with ExitStack() as stack:
        files = [_open(stack, path, data, part, checked.raw_gsm, name) for part in checked.parts]
        rate = _sample_rate(files, name)
        n_samples = checked.n_samples or sum(file.frames for file in files)
        try:
            if checked.has_length and n_samples < UNKNOWN_SAMPLES:
                first, last = bounds(n_samples, rate)
                return Decoded(_decode_range(files, first, last, name), rate, True)
            samples = _decode_to_end(files[0])
        except (soundfile.SoundFileError, MemoryError) as error:
            # MemoryError: a header that claims hundreds of hours
            raise AudioError(
                f"{name}: is damaged or cut off ({error}); record or copy it again."
            ) from error
    first, last = bounds(len(samples), rate)
    return Decoded(samples[first:last], rate, False)


def file_name(path: Path) -> str:
    """What messages call the file."""
    return "standard input" if str(path) == STDIN else str(path)


# --- bytes ---


def _contents(path: Path) -> Bytes:
    """All of a file, mapped into memory, or of a pipe."""
    name = file_name(path)
    try:
        content = _read(path, name)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file; check the path to the recording.") from error
    except PermissionError as error:
        raise AudioError(
            f"{name}: may not be read, permission denied; make it readable (chmod +r)."
        ) from error
    except (OSError, ValueError) as error:
        raise AudioError(
            f"{name}: cannot be read ({error}); check the path to the recording."
        ) from error
    if not content:
        raise AudioError(
            f"{name}: is an empty file (0 bytes), expected audio; record or copy it again."
        )
    return content


def _read(path: Path, name: str) -> Bytes:
    if str(path) == STDIN:
        if sys.stdin is None:
            raise AudioError(
                f"{name}: is closed, expected audio; send a recording to it (cat FILE | ...)."
            )
        return _read_pipe(sys.stdin.buffer, name)
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(
            f"{path}: is a folder, expected an audio file; give one of the files in it."
        )
    is_pipe = stat.S_ISFIFO(status.st_mode)
    if not is_pipe and not stat.S_ISREG(status.st_mode):
        raise AudioError(
            f"{path}: is a device, expected an audio file or a pipe; give a recording."
        )
    with path.open("rb") as file:
        if is_pipe:
            return _read_pipe(file, name)
        if not status.st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_pipe(file: IO[bytes], name: str) -> bytes:
    if file.isatty():
        raise AudioError(
            f"{name}: is a terminal, expected audio; send a recording to it (cat FILE | ...)."
        )
    content = file.read(MAX_PIPE_BYTES + 1)
    if len(content) > MAX_PIPE_BYTES:
        raise AudioError(
            f"{name}: has more than {MAX_PIPE_BYTES >> 30} GiB, expected a recording; "
            "give it as a file."
        )
    return content


def _fingerprint(path: Path, data: Bytes) -> tuple[int, ...]:
    """Differs for other content, even if a file is written twice within a tick of the clock."""
    begin_crc = zlib.crc32(data[:EDGE_BYTES])
    end_crc = zlib.crc32(data[-EDGE_BYTES:])
    return len(data), path.stat().st_mtime_ns, begin_crc, end_crc


@functools.lru_cache(maxsize=1)  # the utterances of a long recording are read one by one
def _examine_file(path: Path, _fingerprint: tuple[int, ...]) -> CheckedFile:
    return examine(_contents(path), str(path))


# --- samples ---


class _File(soundfile.SoundFile):
    """A file that is read in order.

    soundfile seeks after every read of a file that says it is seekable, which some codecs are not.
    """

    def seekable(self) -> bool:
        return False


class _Source:
    """What libsndfile reads from; a seek to nowhere is left for libsndfile to complain about."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.tell = file.tell
        self.readinto = file.readinto

    def seek(self, offset: int, whence: int = 0) -> None:
        with suppress(OSError, ValueError):
            self._file.seek(offset, whence)


def _open(
    stack: ExitStack, path: Path, data: Bytes, part: list[Piece], raw_gsm: bool, name: str
) -> _File:
    """Open a part of a file, to be closed with the stack."""
    source: io.BufferedIOBase
    if part == [slice(0, None)] and isinstance(data, mmap.mmap):
        source = stack.enter_context(path.open("rb"))
    else:
        pieces = [data[piece] if isinstance(piece, slice) else piece for piece in part]
        source = io.BytesIO(b"".join(pieces))
    options = RAW_GSM if raw_gsm else {}
    try:
        return stack.enter_context(_File(_Source(source), **options))
    except soundfile.SoundFileError as error:
        reason = foreign_format(data)
        if reason is None:
            message = getattr(error, "error_string", error)
            reason = f"or is cut off in its header: {message}"
        raise AudioError(
            f"{name}: is not audio we can read ({reason}); "
            f"expected WAV, FLAC, OGG or MP3; {CONVERT}."
        ) from error


def _sample_rate(files: list[_File], name: str) -> int:
    """Hz; all links of a chain have the same rate and number of channels."""
    formats = {(file.samplerate, file.channels) for file in files}
    if len(formats) > 1:
        raise AudioError(
            f"{name}: is a chain of streams of several rates or channel counts; "
            f"expected one; {CONVERT}."
        )
    rate = files[0].samplerate
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"{name}: its header says {rate} Hz, expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} "
            "Hz; record it again."
        )
    return rate


def _decode_range(files: list[_File], first: int, last: int, name: str) -> np.ndarray:
    """(S, C) float32 from `first` up to `last` of one file after another."""
    pieces = [np.zeros((0, files[0].channels), np.float32)]
    file_start = 0
    for file in files:
        begin = max(first - file_start, 0)
        end = min(last - file_start, file.frames)
        if begin < end:
            pieces.append(_decode_file(file, begin, end - begin, name))
        file_start += file.frames
    return np.concatenate(pieces)


def _decode_file(file: _File, first: int, n_samples: int, name: str) -> np.ndarray:
    """(n_samples, C) float32 from `first` on."""
    if file.subtype.startswith(SEQUENTIAL_CODECS):
        for n_left in range(first, 0, -BLOCK_SAMPLES):
            file.read(min(n_left, BLOCK_SAMPLES))
    elif first:
        file.seek(first)
    samples = file.read(n_samples, dtype="float32", always_2d=True)  # (S, C)
    is_mpeg = file.subtype.startswith("MPEG")  # its frames have been counted
    if len(samples) < n_samples and not is_mpeg:
        raise cut_off(name, f"{len(samples)} of {n_samples} samples are there")
    if file.format == "FLAC" and first + n_samples < file.frames:
        file.seek(file.frames - 1)  # fails if the end is missing: the header does not tell
        file.read(1)
    return samples


def _decode_to_end(file: _File) -> np.ndarray:
    """(S, C) float32: all samples."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while True:
        block = file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        if not len(block):
            return np.concatenate(blocks)
        blocks.append(block)
