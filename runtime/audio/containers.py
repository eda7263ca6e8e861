"""Is an audio file whole? What its header promises, compared with what is there.

libsndfile reads most files that are cut off as if they were whole. So before it opens a file, we
look up how many bytes (here, old_containers.py) or pages and frames (streams.py) there should be.
A size that a recorder left open, because it wrote to a pipe, is filled in. If a container never
says how long it is, that is noted. All other faults of a header are left to libsndfile.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tiny_align.runtime.audio import streams
from tiny_align.runtime.audio.old_containers import PROMISED_END
from tiny_align.runtime.audio.streams import Bytes, cut_off

MAGIC_BYTES = 24  # the first bytes of a file, which tell its container
# A 32-bit size from here up is a placeholder: the writer had a pipe, not a file.
PLACEHOLDER_BYTES = 0x7FFF_0000
UNKNOWN_AU_BYTES = 0xFFFF_FFFF  # AU's own placeholder
W64_NAME = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # after the first four letters of a name
# Names that tell whether a chunk follows one of an odd size without padding.
WAV_CHUNKS = (b"data", b"fact", b"fmt ", b"LIST", b"bext", b"cue ", b"smpl", b"PEAK")
WAV_GSM = b"\x31\0"  # a WAV's number for GSM 6.10
WAV_GSM_BLOCK_BYTES = 65
WAV_GSM_BLOCK_SAMPLES = 320
GSM_FRAME_BYTES = 33
GSM_MARK = 0xD  # the first four bits of a frame of GSM 6.10
MIN_GSM_FRAMES = 5  # fewer are not recognised
FOREIGN = (  # formats that libsndfile does not read: byte offset, bytes there, name
    (4, b"ftyp", "MP4, M4A or MOV"),
    (0, b"\x30\x26\xb2\x75", "WMA or WMV"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"#!AMR", "AMR"),
    (0, b"FLV", "Flash video"),
    (8, b"AVI ", "AVI"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (28, b"Speex", "Speex"),
    (28, b"\x7fFLAC", "FLAC in Ogg"),
    (28, b"\x80theora", "Ogg video"),
    (0, b"wvpk", "WavPack"),
)

Piece = slice | bytes  # bytes of the file, or others in their place


@dataclass(frozen=True)
class CheckedFile:
    """A file of which nothing is known to be missing, and what libsndfile reads of it."""

    parts: list[list[Piece]]  # read one after another; the pieces of each are joined
    has_length: bool = True  # False: we cannot tell whether its end is missing
    raw_gsm: bool = False  # frames of GSM 6.10 at 8 kHz without a header
    n_samples: int | None = None  # of each channel, if libsndfile counts wrongly


def examine(data: Bytes, name: str) -> CheckedFile:
    """Check that a file is whole.

    Args:
        data: all bytes of the file.
        name: begins an error's message.

    Raises:
        AudioError: the file is cut off or damaged.
    """
    start = streams.after_id3(data)
    magic = data[start : start + MAGIC_BYTES]
    if magic.startswith(b"OggS"):
        return CheckedFile([[link] for link in streams.ogg_links(data, start, name)])
    if layout := CHUNK_LAYOUTS.get(magic[:4]):
        return _examine_chunks(data, start, name, layout)
    if magic.startswith((b".snd", b"dns.")):
        return _examine_au(data, start, name)
    if _is_gsm(data):
        if len(data) % GSM_FRAME_BYTES:
            raise cut_off(name, "its last frame is incomplete")
        return CheckedFile([[slice(0, None)]], has_length=False, raw_gsm=True)
    if magic.startswith(b"\xff"):
        return _examine_mpeg(data, start, name)
    for mark, promised_end in PROMISED_END.items():
        if magic.startswith(mark):
            return _examine_old(data, start, name, promised_end)
    return _all_from(start)


def foreign_format(data: Bytes) -> str | None:
    """The name of a format that libsndfile cannot open, if we know it."""
    for at, mark, format_name in FOREIGN:
        if data[at : at + len(mark)] == mark:
            return format_name
    return None


def _all_from(start: int, has_length: bool = True) -> CheckedFile:
    """The file as it is, from byte `start` on."""
    return CheckedFile([[slice(start, None)]], has_length)


def _require_bytes(promised: int, present: int, name: str) -> None:
    if present < promised:
        raise cut_off(
            name, f"its header promises {promised} bytes of samples and {present} are there"
        )


# --- chunks: WAV, RF64, AIFF, 8SVX, CAF, W64 ---


@dataclass(frozen=True)
class ChunkLayout:
    """How a container is divided into chunks that have a name and a size."""

    first: int  # byte offset of the first chunk
    name_bytes: int
    size_form: str  # struct's
    data: tuple[bytes, ...]  # names of the chunk that holds the samples
    align: int = 2  # chunks begin at multiples of this
    size_counts_header: bool = False
    forms: tuple[bytes, ...] = (b"",)  # the container's kinds that hold audio

    @property
    def header_bytes(self) -> int:
        return self.name_bytes + struct.calcsize(self.size_form)


CHUNK_LAYOUTS = {  # first bytes -> layout
    b"RIFF": ChunkLayout(12, 4, "<I", (b"data",), forms=(b"WAVE",)),
    b"RIFX": ChunkLayout(12, 4, ">I", (b"data",), forms=(b"WAVE",)),
    b"RF64": ChunkLayout(12, 4, "<I", (b"data",), forms=(b"WAVE",)),
    b"FORM": ChunkLayout(12, 4, ">I", (b"SSND", b"BODY"), forms=(b"AIF", b"8SVX", b"16SV")),
    b"caff": ChunkLayout(8, 4, ">Q", (b"data",), align=1),
    b"riff": ChunkLayout(40, 16, "<Q", (b"data" + W64_NAME,), align=8, size_counts_header=True),
}


@dataclass(frozen=True)
class Chunk:
    name: bytes
    at: int  # byte offset of its header
    begin: int  # byte offset of its content
    size: int  # of its content in bytes, as its header has it
    lacks_padding: bool  # before it, though the size of the previous chunk is odd


class _Edit(NamedTuple):
    """Other bytes in place of some of the file's."""

    begin: int
    end: int
    content: bytes


def _chunks(data: Bytes, start: int, layout: ChunkLayout) -> Iterator[Chunk]:
    """The chunks one after another, up to something that is no chunk."""
    at = start + layout.first
    lacks_padding = False
    while at + layout.header_bytes <= len(data):
        begin = at + layout.header_bytes
        name = data[at : at + layout.name_bytes]
        if not name[:4].isascii() or not name[:4].decode().isprintable():
            return
        size = _number(data, at + layout.name_bytes, layout.size_form)
        if layout.size_counts_header:
            size = max(0, size - layout.header_bytes)
        yield Chunk(name, at, begin, size, lacks_padding)
        end = begin + size
        at = end + (start - end) % layout.align
        lacks_padding = (
            at == end + 1
            and data[end : end + 4] in WAV_CHUNKS
            and data[at : at + 4] not in WAV_CHUNKS
        )
        if lacks_padding:
            at = end


def _number(data: Bytes, at: int, form: str) -> int:
    """The number at a byte offset, in one of struct's forms."""
    return struct.unpack(form, data[at : at + struct.calcsize(form)])[0]


def _find(chunks: list[Chunk], *names: bytes) -> Chunk | None:
    return next((chunk for chunk in chunks if chunk.name in names), None)


def _examine_chunks(data: Bytes, start: int, name: str, layout: ChunkLayout) -> CheckedFile:
    chunks = list(_chunks(data, start, layout))
    samples = _find(chunks, *layout.data)
    if samples is None:
        end = chunks[-1].begin + chunks[-1].size if chunks else start + layout.first
        is_audio = data[start + 8 : start + 12].startswith(layout.forms)
        if is_audio and end + layout.header_bytes > len(data):
            raise cut_off(name, "it ends before its samples")
        return _all_from(start)  # libsndfile says what is wrong with it

    size_at = samples.at + layout.name_bytes
    size_form = layout.size_form
    promised = samples.size
    wide_sizes = _find(chunks, b"ds64")  # RF64: sizes of 64 bits
    if wide_sizes and wide_sizes.begin + 16 <= samples.at:
        size_at = wide_sizes.begin + 8
        size_form = "<Q"
        promised = _number(data, size_at, size_form)

    edits = []
    for chunk in chunks:
        if chunk.lacks_padding and chunk.at <= samples.at:
            edits.append(_Edit(chunk.at, chunk.at, b"\0"))

    present = len(data) - samples.begin
    following = data[samples.begin : samples.begin + layout.header_bytes]
    if _is_placeholder(promised, present, size_form, layout, following):
        n_size_bytes = struct.calcsize(size_form)
        if n_size_bytes == 8 or promised == 0:
            size = present + (layout.header_bytes if layout.size_counts_header else 0)
            packed = struct.pack(size_form, min(size, 256**n_size_bytes - 1))
            edits.append(_Edit(size_at, size_at + n_size_bytes, packed))
        return CheckedFile([_edited(start, edits)], has_length=False)

    _require_bytes(promised, present, name)
    _require_packet_table(data, chunks, name)
    n_samples = _gsm_samples(data, chunks, promised)
    return CheckedFile([_edited(start, edits)], n_samples=n_samples)


def _is_placeholder(
    promised: int, present: int, size_form: str, layout: ChunkLayout, following: bytes
) -> bool:
    """Whether a size was left open: the writer had a pipe and could not go back to it.

    A size of 0 is real if nothing follows it, or a chunk: a name and a size that fits.
    """
    if struct.calcsize(size_form) == 8 and promised:
        return promised >= 2**63
    if promised:
        return promised >= PLACEHOLDER_BYTES and promised > present
    if len(following) < layout.header_bytes:
        return present > 0
    size = _number(following, layout.name_bytes, layout.size_form)
    is_chunk = following[:4].strip().isalnum() and size <= present - layout.header_bytes
    return present > 0 and not is_chunk


def _require_packet_table(data: Bytes, chunks: list[Chunk], name: str) -> None:
    """Refuse a CAF with packets of several sizes whose table, maybe behind the samples, is cut."""
    description = _find(chunks, b"desc")
    if not description or data[description.begin + 16 : description.begin + 20] != bytes(4):
        return
    table = _find(chunks, b"pakt")
    if table is None or table.begin + table.size > len(data):
        raise cut_off(name, "its table of packets is missing or incomplete")


def _gsm_samples(data: Bytes, chunks: list[Chunk], n_bytes: int) -> int | None:
    """Samples of a WAV of GSM 6.10: libsndfile takes the padding of an odd chunk for a block."""
    for chunk in chunks:
        if chunk.name[:4] == b"fmt ":
            if data[chunk.begin : chunk.begin + 2] != WAV_GSM:
                return None
            return n_bytes // WAV_GSM_BLOCK_BYTES * WAV_GSM_BLOCK_SAMPLES
    return None


def _edited(start: int, edits: list[_Edit]) -> list[Piece]:
    """The file from byte `start` on, with the edits in it."""
    pieces: list[Piece] = []
    for edit in sorted(edits):
        pieces += [slice(start, edit.begin), edit.content]
        start = edit.end
    return [*pieces, slice(start, None)]


# --- others ---


def _examine_mpeg(data: Bytes, start: int, name: str) -> CheckedFile:
    frames = streams.mpeg_frames(data, start)
    if frames is None:
        return _all_from(start, has_length=False)
    frames.require_whole(name)
    has_length = bool(frames.promised_frames)
    # More frames than promised: several files one after another.
    if frames.is_layer_iii and (frames.promised_frames or 0) < frames.n_frames:
        counted: list[Piece] = [streams.xing_frame(data, frames), slice(frames.begin, None)]
        return CheckedFile([counted], has_length)
    return _all_from(start, has_length)


def _examine_au(data: Bytes, start: int, name: str) -> CheckedFile:
    order = ">" if data[start : start + 1] == b"." else "<"
    header = data[start : start + 12]
    if len(header) < 12:
        return _all_from(start)
    data_at, promised = struct.unpack(order + "4x2I", header)
    present = max(0, len(data) - start - data_at)
    if promised in (0, UNKNOWN_AU_BYTES) and present:
        size_at = start + 8
        edit = _Edit(size_at, size_at + 4, b"\xff" * 4)
        return CheckedFile([_edited(start, [edit])], has_length=False)
    _require_bytes(promised, present, name)
    return _all_from(start)


def _is_gsm(data: Bytes) -> bool:
    """Whether this is GSM 6.10 without a header: all frames begin with the same four bits."""
    if len(data) < MIN_GSM_FRAMES * GSM_FRAME_BYTES or data[0] >> 4 != GSM_MARK:
        return False
    return all(byte >> 4 == GSM_MARK for byte in data[::GSM_FRAME_BYTES])


def _examine_old(
    data: Bytes, start: int, name: str, promised_end: Callable[[bytes], int | None]
) -> CheckedFile:
    present = len(data) - start
    try:
        end = promised_end(data[start:])
    except (struct.error, LookupError, ValueError) as error:
        raise cut_off(name, "its header is incomplete") from error
    if end is not None and end > present:
        raise cut_off(name, f"its header promises {end} bytes and {present} are there")
    return _all_from(start, has_length=end is not None)
