"""A file, a pipe or standard input -> its samples, by libsndfile; cut off, damaged or foreign ones are refused."""

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

import numpy as np
import soundfile

from tiny_align.runtime.audio import containers
from tiny_align.runtime.audio.containers import Whole
from tiny_align.runtime.audio.streams import Bytes, cut_off
from tiny_align.runtime.errors import AudioError

STDIN = "-"
MAX_PIPE_BYTES = 2**31
SAMPLE_RATES = (4_000, 768_000)  # Hz: less is no speech; a header that says another is wrong
UNKNOWN_FRAMES = 2**62  # libsndfile's count for a FLAC stream that was written to a pipe
BLOCK_SAMPLES = 2**18
EDGE_BYTES = 2**16
NO_ENTRANCE = (
    "GSM",
    "G721",
    "G723",
    "NMS",
    "DWVW",
    "DPCM",
)  # codecs that libsndfile reads from the beginning only
RAW_GSM = {"format": "RAW", "subtype": "GSM610", "samplerate": 8_000, "channels": 1}
CONVERT = "convert it, for one with `ffmpeg -i FILE out.wav`"


@dataclass(frozen=True)
class Decoded:
    samples: np.ndarray  # (S, C) float32
    sample_rate: int  # Hz, the file's own
    has_length: bool  # False: nobody can tell whether its end is missing


def decode(path: Path, bounds: Callable[[int, int], tuple[int, int]]) -> Decoded:
    """Decode a part of a file.

    Args:
        path: the file, a pipe, or "-" for standard input.
        bounds: called with the number of samples and their rate, says which is the first and which follows the last.

    Raises:
        AudioError: no such file, not audio, cut off or damaged; and what `bounds` raises.
    """
    name, data = file_name(path), _contents(path)
    whole = (
        _examined(path, _fingerprint(path, data))
        if isinstance(data, mmap.mmap)
        else containers.examine(data, name)
    )
    with ExitStack() as stack:
        sources = [stack.enter_context(_source(path, data, part)) for part in whole.parts]
        files = [stack.enter_context(_opened(source, data, whole, name)) for source in sources]
        rate, n_samples = _rate(files, name), whole.n_samples or sum(file.frames for file in files)
        try:
            if whole.has_length and n_samples < UNKNOWN_FRAMES:
                return Decoded(_decoded(files, *bounds(n_samples, rate), name), rate, True)
            samples = _decoded_to_end(files[0])
        except (
            soundfile.SoundFileError,
            MemoryError,
        ) as error:  # MemoryError: a header that claims hundreds of hours
            raise AudioError(
                f"{name}: is damaged or cut off ({error}); record or copy it again."
            ) from error
    first, last = bounds(len(samples), rate)
    return Decoded(samples[first:last], rate, False)


def file_name(path: Path) -> str:
    return "standard input" if str(path) == STDIN else str(path)


# --- bytes ---


def _contents(path: Path) -> Bytes:
    """All of a file, mapped into memory, or of a pipe."""
    name = file_name(path)
    try:
        content = _from_pipe(_stdin(), name) if str(path) == STDIN else _of_path(path)
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


def _stdin():
    if sys.stdin is None:
        raise AudioError(
            "standard input: is closed, expected audio; send a recording to it (cat FILE | ...)."
        )
    return sys.stdin.buffer


def _of_path(path: Path) -> Bytes:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(
            f"{path}: is a folder, expected an audio file; give one of the files in it."
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        raise AudioError(
            f"{path}: is a device, expected an audio file or a pipe; give a recording."
        )
    with path.open("rb") as file:
        if stat.S_ISFIFO(status.st_mode):
            return _from_pipe(file, str(path))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""


def _from_pipe(file, name: str) -> bytes:
    if file.isatty():
        raise AudioError(
            f"{name}: is a terminal, expected audio; send a recording to it (cat FILE | ...)."
        )
    content = file.read(MAX_PIPE_BYTES + 1)
    if len(content) > MAX_PIPE_BYTES:
        raise AudioError(
            f"{name}: has more than {MAX_PIPE_BYTES >> 30} GiB, expected a recording; give it as a file."
        )
    return content


def _fingerprint(path: Path, data: Bytes) -> tuple[int, ...]:
    """Another one for another content, also where a file has been written twice within a tick of the clock."""
    return (
        len(data),
        path.stat().st_mtime_ns,
        zlib.crc32(data[:EDGE_BYTES]),
        zlib.crc32(data[-EDGE_BYTES:]),
    )


@functools.lru_cache(maxsize=1)  # the utterances of a long recording are read one by one
def _examined(path: Path, _fingerprint: tuple[int, ...]) -> Whole:
    return containers.examine(_contents(path), str(path))


# --- samples ---


class _File(soundfile.SoundFile):
    """Read in order: soundfile seeks after every read of a file that it can seek in, and some codecs cannot be."""

    def seekable(self) -> bool:
        return False


class _Source:
    """What libsndfile reads from: a header that sends it nowhere is its own to complain about."""

    def __init__(self, file):
        self._file, self.tell, self.readinto = file, file.tell, file.readinto

    def seek(self, offset: int, whence: int = 0) -> None:
        with suppress(OSError, ValueError):
            self._file.seek(offset, whence)


def _source(path: Path, data: Bytes, part: list[slice | bytes]):
    if part == [slice(0, None)] and isinstance(data, mmap.mmap):
        return path.open("rb")
    return io.BytesIO(
        b"".join(data[piece] if isinstance(piece, slice) else piece for piece in part)
    )


def _opened(file, data: Bytes, whole: Whole, name: str) -> _File:
    try:
        return _File(_Source(file), **(RAW_GSM if whole.raw_gsm else {}))
    except soundfile.SoundFileError as error:
        reason = (
            containers.foreign(data)
            or f"or is cut off in its header: {getattr(error, 'error_string', error)}"
        )
        raise AudioError(
            f"{name}: is not audio we can read ({reason}); expected WAV, FLAC, OGG or MP3; {CONVERT}."
        ) from error


def _rate(files: list[_File], name: str) -> int:
    """Hz; that and the number of channels are the same in all links of a chain."""
    formats = {(file.samplerate, file.channels) for file in files}
    if len(formats) > 1:
        raise AudioError(
            f"{name}: is a chain of streams of several rates or channel counts; expected one; {CONVERT}."
        )
    rate = files[0].samplerate
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        least, most = SAMPLE_RATES
        raise AudioError(
            f"{name}: its header says {rate} Hz, expected {least} to {most} Hz; record it again."
        )
    return rate


def _decoded(files: list[_File], first: int, last: int, name: str) -> np.ndarray:
    """(S, C) float32 from `first` up to `last` of one file after another."""
    pieces, before = [np.zeros((0, files[0].channels), np.float32)], 0
    for file in files:
        begin, end = max(first - before, 0), min(last - before, file.frames)
        if begin < end:
            pieces.append(_decoded_part(file, begin, end - begin, name))
        before += file.frames
    return np.concatenate(pieces)


def _decoded_part(file: _File, first: int, n_samples: int, name: str) -> np.ndarray:
    if file.subtype.startswith(NO_ENTRANCE):
        for left in range(first, 0, -BLOCK_SAMPLES):
            file.read(min(left, BLOCK_SAMPLES))
    elif first:
        file.seek(first)
    samples = file.read(n_samples, dtype="float32", always_2d=True)  # (S, C)
    if len(samples) < n_samples and not file.subtype.startswith(
        "MPEG"
    ):  # whose frames have been counted
        raise cut_off(name, f"{len(samples)} of {n_samples} samples are there")
    if (
        file.format == "FLAC" and first + n_samples < file.frames
    ):  # only its samples tell whether it is whole
        file.seek(file.frames - 1)
        file.read(1)
    return samples


def _decoded_to_end(file: _File) -> np.ndarray:
    blocks = [np.zeros((0, file.channels), np.float32)]
    while len(block := file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        blocks.append(block)
    return np.concatenate(blocks)
