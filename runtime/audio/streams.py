"""Streams of pages and frames: is an Ogg or an MP3 whole? The containers with a length in their header: containers.py.

Ogg is sure: pages are numbered, have a checksum, and the last one of a stream says so. MP3 knows where a frame is cut;
how many there should be is known where an encoder wrote it into the first one (Xing, Info, VBRI).
"""

import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_align.runtime.errors import AudioError

Bytes = bytes | mmap.mmap

BEGINS, ENDS = 2, 4  # flags of an Ogg page
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

MPEG_1, MPEG_2_5 = 3, 0  # versions, as a header has them
LAYER_I, LAYER_II, LAYER_III = 3, 2, 1
RATES = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}  # Hz, by version
KBIT_MPEG_1 = {
    LAYER_I: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    LAYER_II: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    LAYER_III: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
KBIT_MPEG_2 = {
    LAYER_I: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    LAYER_II: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    LAYER_III: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MAX_FILLING = 2**16  # bytes
TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI")  # what may follow the last frame


def cut_off(name: str, what: str) -> AudioError:
    return AudioError(f"{name}: is cut off, {what}; record or copy it again.")


def damaged(name: str, what: str) -> AudioError:
    return AudioError(f"{name}: is damaged, {what}; record or copy it again.")


# --- Ogg ---


@dataclass(frozen=True)
class _Page:
    begin: int  # bytes
    end: int
    flags: int
    serial: int
    number: int


def ogg_links(data: Bytes, start: int, name: str) -> list[slice]:
    """The links of an Ogg file, each a file of its own: most have one, chained ones more.

    Raises:
        AudioError: a page is damaged or missing, or the last one of a stream is.
    """
    links, open_streams, all_begun = [], {}, True
    for page in _pages(data, start, name):
        if page.flags & BEGINS and all_begun:  # those of one link stand together, before all others
            _require_ended(open_streams, name)
            links.append(page.begin)
        all_begun = not page.flags & BEGINS
        if page.flags & BEGINS:
            open_streams[page.serial] = page.number
        elif open_streams.pop(page.serial, None) != page.number - 1:
            raise damaged(name, f"a page is missing at byte {page.begin}")
        elif not page.flags & ENDS:
            open_streams[page.serial] = page.number
    _require_ended(open_streams, name)
    return [slice(begin, end) for begin, end in zip(links, [*links[1:], None])]


def _require_ended(open_streams: dict, name: str) -> None:
    if open_streams:
        raise cut_off(name, "its last page is missing")


def _pages(data: Bytes, at: int, name: str) -> Iterator[_Page]:
    while at < len(data):
        head = data[at : at + 27]
        sizes = data[at + 27 : at + 27 + (head[26] if len(head) == 27 else 0)]
        end = at + 27 + len(sizes) + sum(sizes)
        if not b"OggS".startswith(head[:4]):
            if data.find(b"OggS", at) < 0 and at:  # nothing of the stream: what somebody has added
                return
            raise damaged(name, f"there is no page at byte {at}")
        if len(head) < 27 or len(sizes) < head[26] or end > len(data):
            raise cut_off(name, "its last page is incomplete")
        flags, serial, number, checksum = struct.unpack("<5xB8xIII", head[:26])
        if _ogg_checksum(head[:22] + bytes(4) + data[at + 26 : end]) != checksum:
            raise damaged(name, f"a page at byte {at} has a wrong checksum")
        yield _Page(at, end, flags, serial, number)
        at = end


def _ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 is zlib's with all bits in the other order and nothing inverted."""
    mirrored = zlib.crc32(page.translate(MIRRORED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(MIRRORED), "big")


# --- MPEG audio: MP3 and its elder brothers ---


@dataclass
class MpegFrames:
    """What was found of an MPEG stream, and what its first frame promises."""

    begin: int = 0  # of the first frame with sound
    n_frames: int = 0
    n_bytes: int = 0
    promised_frames: int | None = None
    promised_bytes: int | None = None
    ends_inside: bool = False  # the last frame is incomplete
    is_layer_iii: bool = True
    resumes_at: int | None = None  # something that is no frame, and frames again after it

    def require_whole(self, name: str) -> None:
        """
        Raises:
            AudioError: the last frame is incomplete, some are missing, or there is something else between them.
        """
        fewer_bytes = not self.promised_bytes or self.n_bytes < self.promised_bytes
        if self.promised_frames and self.n_frames < self.promised_frames and fewer_bytes:
            raise cut_off(
                name,
                f"its header promises {self.promised_frames} frames and {self.n_frames} are there",
            )
        if self.ends_inside:
            raise cut_off(name, "its last frame is incomplete")
        if self.resumes_at is not None:
            raise damaged(
                name, f"there is something else between its frames, before byte {self.resumes_at}"
            )


def mpeg_frames(data: Bytes, start: int) -> MpegFrames | None:
    """Walk the frames of an MPEG stream from `start` on; None: not one, or of a bit rate that no header tells."""
    first = _first_frame(data, start)
    if first is None:
        return None
    head = data[first : first + 4]
    found, kind, at = (
        MpegFrames(first, is_layer_iii=head[1] >> 1 & 3 == LAYER_III),
        _kind(head),
        first,
    )
    if _read_promise(found, data[first : first + 200]):
        found.begin = first + frame_bytes(head)
    while at < len(data):
        head = data[at : at + 4]
        if _kind(head) != kind or not (length := frame_bytes(head)):
            at = _after_other(found, data, at, kind)
            continue
        if at + length > len(data):
            found.ends_inside = True
            break
        found.n_frames, at = found.n_frames + 1, at + length
        found.n_bytes = at - first
    if found.begin > first:  # the frame that promises has no sound and is not counted
        found.n_frames -= 1
    return found


def xing_frame(data: Bytes, found: MpegFrames) -> bytes:
    """A frame without sound that says how many follow: libsndfile reads no more than it is told, or has guessed."""
    head = bytearray(data[found.begin : found.begin + 4])
    head[1] |= 1  # no checksum
    head[2] = 0x90 | head[2] & 0x0C  # a bit rate with enough room
    frame = bytearray(head).ljust(frame_bytes(head), b"\0")
    mono, side_bytes = head[3] >> 6 == 3, (17, 32) if head[1] >> 3 & 3 == MPEG_1 else (9, 17)
    at = 4 + side_bytes[0 if mono else 1]
    struct.pack_into(">4s3I", frame, at, b"Xing", 3, found.n_frames, len(frame) + found.n_bytes)
    return bytes(frame)


def frame_bytes(head: bytes) -> int | None:
    """Length of the frame that begins with these four bytes; None: no header, or one that does not say."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
        return None
    kbit = (KBIT_MPEG_1 if version == MPEG_1 else KBIT_MPEG_2)[layer][bit_rate - 1]
    hz = RATES[version][rate]
    if layer == LAYER_I:
        return (12_000 * kbit // hz + padding) * 4
    return (72_000 if layer == LAYER_III and version != MPEG_1 else 144_000) * kbit // hz + padding


def _kind(head: bytes) -> tuple[int, int] | None:
    """What all frames of a stream have in common: version, layer and rate."""
    return (head[1] & 0xFE, head[2] & 0x0C) if len(head) == 4 and head[0] == 0xFF else None


def _first_frame(data: Bytes, at: int) -> int | None:
    """Where two frames of a kind follow each other, or one and the end."""
    for begin in range(at, min(at + 4096, len(data))):
        if length := frame_bytes(head := data[begin : begin + 4]):
            following = data[begin + length : begin + length + 4]
            if _kind(following) == _kind(head) or begin + length >= len(data):
                return begin
    return None


def _read_promise(found: MpegFrames, first: bytes) -> bool:
    """Whether the first frame is there to say how many follow; what it says goes to `found`."""
    for mark in (b"Xing", b"Info"):
        if (at := first.find(mark)) > 0 and len(first) >= at + 16:
            flags, *values = struct.unpack_from(">3I", first, at + 4)
            if flags & 1:
                found.promised_frames = values.pop(0)
            if flags & 2:
                found.promised_bytes = values.pop(0)
            return True
    if (at := first.find(b"VBRI")) > 0 and len(first) >= at + 18:
        found.promised_bytes, found.promised_frames = struct.unpack_from(">2I", first, at + 10)
        return True
    return False


def _after_other(found: MpegFrames, data: Bytes, at: int, kind: tuple[int, int]) -> int:
    """Where to go on after what is no frame: a tag, or something that should not be there."""
    if data[at : at + 3] == b"ID3":
        return after_id3(data, at)
    rest = data[at : at + 4]
    if rest.startswith(TAGS) or (len(rest) < 4 and not rest.startswith(b"\xff")):
        return len(data)
    if len(rest) < 4:
        found.ends_inside = True
        return len(data)
    while (at := data.find(b"\xff", at + 1)) >= 0:
        length = frame_bytes(head := data[at : at + 4])
        if length and _kind(head) == kind and _kind(data[at + length : at + length + 4]) == kind:
            found.resumes_at = at
            return at
    return len(data)


def after_id3(data: Bytes, at: int = 0) -> int:
    """Where what follows the ID3v2 tags at `at`, and the zeros that fill them up, begins."""
    while data[at : at + 3] == b"ID3" and len(head := data[at : at + 10]) == 10:
        a, b, c, d = head[6:]
        has_footer = head[5] & 0x10
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if has_footer else 0)
        filling = data[at : at + MAX_FILLING]
        at += len(filling) - len(filling.lstrip(b"\0"))
    return min(at, len(data))
