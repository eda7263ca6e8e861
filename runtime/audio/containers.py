"""Is an audio file whole? What its header promises, compared with what is there.

libsndfile reads most files that are cut off as if they were whole. So before it opens one, we look up how many bytes
(here, old_containers.py) or pages and frames (streams.py) there should be. A length that a recorder left open, because
it wrote to a pipe, is filled in. Where a container never says how long it is, that is noted. Everything else in a
header is libsndfile's to read, and to complain about.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tiny_align.runtime.audio import streams
from tiny_align.runtime.audio.old_containers import PROMISED_END
from tiny_align.runtime.audio.streams import Bytes, cut_off

STREAMED_BYTES = (
    0x7FFF_0000  # a 32-bit size from here up is a placeholder: the writer had a pipe, not a file
)
W64_NAME = bytes.fromhex(
    "f3acd3118cd100c04f8edb8a"
)  # behind the first four letters of a chunk's name
MAY_FOLLOW = (
    b"data",
    b"fact",
    b"fmt ",
    b"LIST",
    b"bext",
    b"cue ",
    b"smpl",
    b"PEAK",
)  # an odd chunk of a WAV
WAV_GSM, WAV_GSM_BLOCK = (
    b"\x31\0",
    (65, 320),
)  # a WAV's number for GSM 6.10; bytes and samples of a block
GSM_BYTES, GSM_MARK = 33, 0xD  # a frame of GSM 6.10, and its first four bits
FOREIGN = (  # what people have that libsndfile does not read: where to look, for which bytes, what it is
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


@dataclass(frozen=True)
class Whole:
    """A file of which nothing is known to be missing, and what libsndfile is to be given of it."""

    parts: list[list[slice | bytes]]  # to be read one after another, each joined of pieces
    has_length: bool = True  # False: nobody can tell whether its end is missing
    raw_gsm: bool = False  # frames of GSM 6.10 at 8 kHz without a header
    n_samples: int | None = None  # of each channel, where libsndfile counts wrongly


def examine(data: Bytes, name: str) -> Whole:
    """
    Raises:
        AudioError: cut off or damaged; `name` begins the message.
    """
    start = streams.after_id3(data)
    magic = data[start : start + 24]
    if magic.startswith(b"OggS"):
        return Whole([[link] for link in streams.ogg_links(data, start, name)])
    if family := FAMILIES.get(magic[:4]):
        return _chunked(data, start, name, family)
    if magic.startswith((b".snd", b"dns.")):
        return _au(data, start, name)
    if _is_gsm(data):
        return _gsm(data, name)
    if magic.startswith(b"\xff"):
        return _mpeg(data, start, name)
    promised_end = next(
        (end for known, end in PROMISED_END.items() if magic.startswith(known)), None
    )
    if promised_end:
        return _old(data, start, name, promised_end)
    return Whole([[slice(start, None)]])


def foreign(data: Bytes) -> str | None:
    """What a file is that libsndfile cannot open, if we know."""
    return next((kind for at, magic, kind in FOREIGN if data[at : at + len(magic)] == magic), None)


def _require(promised: int, present: int, name: str) -> None:
    if present < promised:
        raise cut_off(
            name, f"its header promises {promised} bytes of samples and {present} are there"
        )


# --- chunks: WAV, RF64, AIFF, 8SVX, CAF, W64 ---


@dataclass(frozen=True)
class Family:
    """Containers whose chunks have a name and a size."""

    first: int  # byte offset of the first chunk
    name_bytes: int
    size_form: str  # struct's
    data: tuple[bytes, ...]  # names of the chunk that holds the samples
    align: int = 2  # chunks begin at multiples of this
    size_counts_header: bool = False
    forms: tuple[bytes, ...] = (b"",)  # what the file may be, where there are others of the kind

    @property
    def header_bytes(self) -> int:
        return self.name_bytes + struct.calcsize(self.size_form)


FAMILIES = {
    b"RIFF": Family(12, 4, "<I", (b"data",), forms=(b"WAVE",)),
    b"RIFX": Family(12, 4, ">I", (b"data",), forms=(b"WAVE",)),
    b"RF64": Family(12, 4, "<I", (b"data",), forms=(b"WAVE",)),
    b"FORM": Family(12, 4, ">I", (b"SSND", b"BODY"), forms=(b"AIF", b"8SVX", b"16SV")),
    b"caff": Family(8, 4, ">Q", (b"data",), align=1),
    b"riff": Family(40, 16, "<Q", (b"data" + W64_NAME,), align=8, size_counts_header=True),
}


@dataclass(frozen=True)
class Chunk:
    name: bytes
    at: int  # byte offset of its header
    begin: int  # and of its content
    size: int  # of its content, as its header has it
    lacks_padding: bool  # in front of it, though the chunk before is odd


def _chunks(data: Bytes, start: int, family: Family) -> Iterator[Chunk]:
    """The chunks one after another, up to something that is none."""
    at, lacks_padding = start + family.first, False
    while (begin := at + family.header_bytes) <= len(data):
        name = data[at : at + family.name_bytes]
        if not name[:4].isascii() or not name[:4].decode().isprintable():
            return
        size = struct.unpack(family.size_form, data[at + family.name_bytes : begin])[0]
        size = max(0, size - family.header_bytes) if family.size_counts_header else size
        yield Chunk(name, at, begin, size, lacks_padding)
        end = begin + size
        at = end + (start - end) % family.align
        lacks_padding = (
            at == end + 1
            and data[end : end + 4] in MAY_FOLLOW
            and data[at : at + 4] not in MAY_FOLLOW
        )
        at = end if lacks_padding else at


def _chunked(data: Bytes, start: int, name: str, family: Family) -> Whole:
    chunks = list(_chunks(data, start, family))
    samples = next((chunk for chunk in chunks if chunk.name in family.data), None)
    if samples is None:
        end = chunks[-1].begin + chunks[-1].size if chunks else start + family.first
        if data[start + 8 : start + 12].startswith(
            family.forms
        ) and end + family.header_bytes > len(data):
            raise cut_off(name, "it ends before its samples")
        return Whole([[slice(start, None)]])  # libsndfile says what is wrong with it
    size_at, form, promised = samples.at + family.name_bytes, family.size_form, samples.size
    wide = next((chunk for chunk in chunks if chunk.name == b"ds64"), None)
    if wide and wide.begin + 16 <= samples.at:
        size_at, form = wide.begin + 8, "<Q"
        promised = struct.unpack(form, data[size_at : size_at + 8])[0]
    edits = {
        chunk.at: (chunk.at, b"\0")
        for chunk in chunks
        if chunk.lacks_padding and chunk.at <= samples.at
    }
    present = len(data) - samples.begin
    following = data[samples.begin : samples.begin + family.header_bytes]
    if _was_left_open(promised, present, form, family, following):
        size = present + (family.header_bytes if family.size_counts_header else 0)
        if struct.calcsize(form) == 8 or promised == 0:
            packed = struct.pack(form, min(size, 256 ** struct.calcsize(form) - 1))
            edits[size_at] = (size_at + len(packed), packed)
        return Whole([_edited(start, edits)], has_length=False)
    _require(promised, present, name)
    _require_packet_table(data, chunks, name)
    return Whole([_edited(start, edits)], n_samples=_samples_of_gsm(data, chunks, promised))


def _was_left_open(
    promised: int, present: int, form: str, family: Family, following: bytes
) -> bool:
    """Whether a size is no size: the writer had a pipe and could not come back to it."""
    if promised == 0:
        return present > 0 and not _is_chunk(following, family, present)
    if struct.calcsize(form) == 8:
        return promised >= 2**63
    return promised >= STREAMED_BYTES and promised > present


def _is_chunk(header: bytes, family: Family, room_bytes: int) -> bool:
    """Whether these bytes are a chunk's name and a size that fits, not samples."""
    if len(header) < family.header_bytes:
        return False
    size = struct.unpack(family.size_form, header[family.name_bytes :])[0]
    return header[:4].strip().isalnum() and size <= room_bytes - family.header_bytes


def _require_packet_table(data: Bytes, chunks: list[Chunk], name: str) -> None:
    """A CAF whose packets vary in size has a table of them, which may stand behind the samples."""
    described = next((chunk for chunk in chunks if chunk.name == b"desc"), None)
    if described is None or data[described.begin + 16 : described.begin + 20] != bytes(4):
        return
    table = next((chunk for chunk in chunks if chunk.name == b"pakt"), None)
    if table is None or table.begin + table.size > len(data):
        raise cut_off(name, "its table of packets is missing or incomplete")


def _samples_of_gsm(data: Bytes, chunks: list[Chunk], n_bytes: int) -> int | None:
    """libsndfile takes the byte that fills up an odd chunk of GSM 6.10 for a block more."""
    described = next((chunk for chunk in chunks if chunk.name[:4] == b"fmt "), None)
    if described is None or data[described.begin : described.begin + 2] != WAV_GSM:
        return None
    return n_bytes // WAV_GSM_BLOCK[0] * WAV_GSM_BLOCK[1]


def _edited(start: int, edits: dict[int, tuple[int, bytes]]) -> list[slice | bytes]:
    """The file from `start` on with other bytes in some places: from -> (up to, what stands there then)."""
    pieces = []
    for begin, (end, instead) in sorted(edits.items()):
        pieces += [slice(start, begin), instead]
        start = end
    return [*pieces, slice(start, None)]


# --- others ---


def _mpeg(data: Bytes, start: int, name: str) -> Whole:
    frames = streams.mpeg_frames(data, start)
    if frames is None:
        return Whole([[slice(start, None)]], has_length=False)
    frames.require_whole(name)
    promised = frames.promised_frames
    if frames.is_layer_iii and (
        not promised or promised < frames.n_frames
    ):  # fewer: files one after another
        counted = [streams.xing_frame(data, frames), slice(frames.begin, None)]
        return Whole([counted], has_length=bool(promised))
    return Whole([[slice(start, None)]], has_length=bool(promised))


def _au(data: Bytes, start: int, name: str) -> Whole:
    order = ">" if data[start : start + 1] == b"." else "<"
    if len(header := data[start : start + 12]) < 12:
        return Whole([[slice(start, None)]])
    data_at, promised = struct.unpack(order + "4x2I", header)
    present = max(0, len(data) - start - data_at)
    if promised in (0, 0xFFFF_FFFF) and present:
        size_at = start + 8
        return Whole([_edited(start, {size_at: (size_at + 4, b"\xff" * 4)})], has_length=False)
    _require(promised, present, name)
    return Whole([[slice(start, None)]])


def _is_gsm(data: Bytes) -> bool:
    """Whether this is bare GSM 6.10: all frames begin with the same four bits."""
    if len(data) < 5 * GSM_BYTES or data[0] >> 4 != GSM_MARK:
        return False
    return all(byte >> 4 == GSM_MARK for byte in data[::GSM_BYTES])


def _gsm(data: Bytes, name: str) -> Whole:
    if len(data) % GSM_BYTES:
        raise cut_off(name, "its last frame is incomplete")
    return Whole([[slice(0, None)]], has_length=False, raw_gsm=True)


def _old(data: Bytes, start: int, name: str, promised_end: Callable[[bytes], int | None]) -> Whole:
    present = len(data) - start
    try:
        end = promised_end(data[start:])
    except (struct.error, LookupError, ValueError) as error:
        raise cut_off(name, "its header is incomplete") from error
    if end is not None and end > present:
        raise cut_off(name, f"its header promises {end} bytes and {present} are there")
    return Whole([[slice(start, None)]], has_length=end is not None)
