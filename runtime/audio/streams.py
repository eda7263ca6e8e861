"""Ogg pages and MPEG audio frames: is a stream whole? Containers with a size: containers.py.

Ogg is certain: its pages are numbered, have a checksum, and the last page of a stream is marked.
Of MPEG audio (MP3) we know whether the last frame is incomplete. How many frames there should be
is known only if the encoder wrote it into the first one (Xing, Info, VBRI).
"""

import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_align.runtime.errors import AudioError

Bytes = bytes | mmap.mmap

PAGE_HEADER_BYTES = 27  # of an Ogg page, before the sizes of its segments
FIRST_PAGE = 2  # flags of an Ogg page
LAST_PAGE = 4
BITS_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

MPEG_1 = 3  # versions, as a frame's header has them
MPEG_2 = 2
MPEG_2_5 = 0
LAYER_I = 3
LAYER_II = 2
LAYER_III = 1
SAMPLE_RATES = {  # Hz, by version
    MPEG_1: (44_100, 48_000, 32_000),
    MPEG_2: (22_050, 24_000, 16_000),
    MPEG_2_5: (11_025, 12_000, 8_000),
}
KBIT_MPEG_1 = {
    LAYER_I: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    LAYER_II: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    LAYER_III: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
KBIT_MPEG_2 = {  # and 2.5
    LAYER_I: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    LAYER_II: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    LAYER_III: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
FRAME_HEADER_BYTES = 4
MAX_SEARCH_BYTES = 4096  # for the first frame
MAX_COUNT_BYTES = 200  # of the first frame, in which a count stands
MAX_ID3_PADDING_BYTES = 2**16
TRAILING_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"3DI")  # may follow the last frame


def cut_off(name: str, reason: str) -> AudioError:
    return AudioError(f"{name}: is cut off, {reason}; record or copy it again.")


def damaged(name: str, reason: str) -> AudioError:
    return AudioError(f"{name}: is damaged, {reason}; record or copy it again.")


# --- Ogg ---


@dataclass(frozen=True)
class _Page:
    begin: int  # bytes
    flags: int
    serial: int  # of its stream
    number: int  # in its stream


def ogg_links(data: Bytes, start: int, name: str) -> list[slice]:
    """The links of an Ogg file, each a file of its own. Most files have one, chained ones more.

    Raises:
        AudioError: a page is damaged or missing, or the last page of a stream is missing.
    """
    begins: list[int] = []
    open_streams: dict[int, int] = {}  # serial -> number of the latest page
    in_first_pages = False
    for page in _pages(data, start, name):
        is_first = bool(page.flags & FIRST_PAGE)
        if is_first and not in_first_pages:  # a link has all its first pages before all others
            _require_ended(open_streams, name)
            begins.append(page.begin)
        in_first_pages = is_first
        if not is_first and open_streams.pop(page.serial, None) != page.number - 1:
            raise damaged(name, f"a page is missing at byte {page.begin}")
        if is_first or not page.flags & LAST_PAGE:
            open_streams[page.serial] = page.number
    _require_ended(open_streams, name)
    ends = [*begins[1:], None]
    return [slice(begin, end) for begin, end in zip(begins, ends)]


def _require_ended(open_streams: dict[int, int], name: str) -> None:
    if open_streams:
        raise cut_off(name, "its last page is missing")


def _pages(data: Bytes, at: int, name: str) -> Iterator[_Page]:
    while at < len(data):
        header = data[at : at + PAGE_HEADER_BYTES]
        is_complete = len(header) == PAGE_HEADER_BYTES
        n_segments = header[26] if is_complete else 0
        sizes_at = at + PAGE_HEADER_BYTES
        sizes = data[sizes_at : sizes_at + n_segments]
        end = sizes_at + len(sizes) + sum(sizes)
        if not b"OggS".startswith(header[:4]):
            if data.find(b"OggS", at) < 0 and at:  # no page follows: something was appended
                return
            raise damaged(name, f"there is no page at byte {at}")
        if not is_complete or len(sizes) < n_segments or end > len(data):
            raise cut_off(name, "its last page is incomplete")
        flags, serial, number, checksum = struct.unpack("<5xB8xIII", header[:26])
        # Ogg's CRC-32 is zlib's with the bits in reverse order and nothing inverted.
        page = header[:22] + bytes(4) + data[at + 26 : end]  # as if without its checksum
        crc = zlib.crc32(page.translate(BITS_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
        reversed_crc = crc.to_bytes(4, "little").translate(BITS_REVERSED)
        if int.from_bytes(reversed_crc, "big") != checksum:
            raise damaged(name, f"a page at byte {at} has a wrong checksum")
        yield _Page(at, flags, serial, number)
        at = end


# --- MPEG audio: MP3 and the older layers ---


@dataclass
class MpegFrames:
    """What was found in an MPEG stream, and what its first frame promises."""

    begin: int  # byte offset of the first frame with sound
    is_layer_iii: bool
    n_frames: int = 0
    n_bytes: int = 0
    promised_frames: int | None = None
    promised_bytes: int | None = None
    ends_inside: bool = False  # the last frame is incomplete
    resumes_at: int | None = None  # byte offset of frames after something that is no frame

    def require_whole(self, name: str) -> None:
        """Refuse a stream that is not whole.

        Raises:
            AudioError: the last frame is incomplete, frames are missing, or there is something
                else between them.
        """
        lacks_frames = self.n_frames < (self.promised_frames or 0)
        lacks_bytes = not self.promised_bytes or self.n_bytes < self.promised_bytes
        if lacks_frames and lacks_bytes:
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
    """Walk the frames of an MPEG stream from byte `start` on.

    Returns:
        None if there is no stream, or one whose headers do not tell the bit rate.
    """
    first = _first_frame(data, start)
    if first is None:
        return None
    header = data[first : first + FRAME_HEADER_BYTES]
    kind = _kind(header)
    frames = MpegFrames(begin=first, is_layer_iii=header[1] >> 1 & 3 == LAYER_III)
    has_count = _read_count(frames, data[first : first + MAX_COUNT_BYTES])
    if has_count:
        frames.begin = first + frame_bytes(header)
    at = first
    while at < len(data):
        header = data[at : at + FRAME_HEADER_BYTES]
        length = frame_bytes(header)
        if not length or _kind(header) != kind:
            at = _skip_other(frames, data, at, kind)
        elif at + length > len(data):
            frames.ends_inside = True
            break
        else:
            at += length
            frames.n_frames += 1
            frames.n_bytes = at - first
    if has_count:  # a frame without sound, which the count leaves out
        frames.n_frames -= 1
    return frames


def xing_frame(data: Bytes, frames: MpegFrames) -> bytes:
    """A frame without sound that tells how many frames follow.

    Without it libsndfile estimates their number, and reads no more than that.
    """
    header = bytearray(data[frames.begin : frames.begin + FRAME_HEADER_BYTES])
    header[1] |= 1  # no checksum
    header[2] = 0x90 | header[2] & 0x0C  # a bit rate whose frames are long enough
    is_mono = header[3] >> 6 == 3
    mono_bytes, stereo_bytes = (17, 32) if header[1] >> 3 & 3 == MPEG_1 else (9, 17)
    side_bytes = mono_bytes if is_mono else stereo_bytes
    frame = header.ljust(frame_bytes(bytes(header)), b"\0")
    n_bytes = len(frame) + frames.n_bytes
    xing_at = FRAME_HEADER_BYTES + side_bytes
    struct.pack_into(">4s3I", frame, xing_at, b"Xing", 3, frames.n_frames, n_bytes)
    return bytes(frame)


def frame_bytes(header: bytes) -> int:
    """Length of the frame that begins with these four bytes; 0: they do not tell."""
    if len(header) < FRAME_HEADER_BYTES or header[0] != 0xFF or header[1] < 0xE0:
        return 0
    version = header[1] >> 3 & 3
    layer = header[1] >> 1 & 3
    bit_rate = header[2] >> 4
    sample_rate = header[2] >> 2 & 3
    padding = header[2] >> 1 & 1
    if version == 1 or layer == 0 or bit_rate in (0, 15) or sample_rate == 3:  # all reserved
        return 0
    kbit = (KBIT_MPEG_1 if version == MPEG_1 else KBIT_MPEG_2)[layer][bit_rate - 1]
    hz = SAMPLE_RATES[version][sample_rate]
    if layer == LAYER_I:
        return (12_000 * kbit // hz + padding) * 4
    if layer == LAYER_III and version != MPEG_1:
        return 72_000 * kbit // hz + padding
    return 144_000 * kbit // hz + padding


def _kind(header: bytes) -> bytes:
    """What all frames of a stream have in common: version, layer and rate; empty: no frame."""
    if len(header) < FRAME_HEADER_BYTES or header[0] != 0xFF:
        return b""
    return bytes([header[1] & 0xFE, header[2] & 0x0C])


def _first_frame(data: Bytes, start: int) -> int | None:
    """Byte offset of a frame after which another of its kind begins, or the data ends."""
    for begin in range(start, min(start + MAX_SEARCH_BYTES, len(data))):
        header = data[begin : begin + FRAME_HEADER_BYTES]
        length = frame_bytes(header)
        if not length:
            continue
        end = begin + length
        following = data[end : end + FRAME_HEADER_BYTES]
        if end >= len(data) or _kind(following) == _kind(header):
            return begin
    return None


def _read_count(frames: MpegFrames, first: bytes) -> bool:
    """Read into `frames` what the first frame promises; False if it is a frame of sound."""
    for mark in (b"Xing", b"Info"):
        at = first.find(mark)
        if at > 0 and len(first) >= at + 16:
            flags, *values = struct.unpack_from(">3I", first, at + 4)
            if flags & 1:
                frames.promised_frames = values.pop(0)
            if flags & 2:
                frames.promised_bytes = values.pop(0)
            return True
    at = first.find(b"VBRI")
    if at > 0 and len(first) >= at + 18:
        n_bytes, n_frames = struct.unpack_from(">2I", first, at + 10)
        frames.promised_bytes = n_bytes
        frames.promised_frames = n_frames
        return True
    return False


def _skip_other(frames: MpegFrames, data: Bytes, at: int, kind: bytes) -> int:
    """Byte offset to go on at after what is no frame: a tag, or something that does not belong."""
    if data[at : at + 3] == b"ID3":
        return after_id3(data, at)
    rest = data[at : at + FRAME_HEADER_BYTES]
    if rest.startswith(TRAILING_TAGS):
        return len(data)
    if len(rest) < FRAME_HEADER_BYTES:
        if rest.startswith(b"\xff"):
            frames.ends_inside = True
        return len(data)
    at = data.find(b"\xff", at + 1)
    while at >= 0:
        header = data[at : at + FRAME_HEADER_BYTES]
        end = at + frame_bytes(header)
        following = data[end : end + FRAME_HEADER_BYTES]
        if end > at and _kind(header) == kind and _kind(following) == kind:
            frames.resumes_at = at
            return at
        at = data.find(b"\xff", at + 1)
    return len(data)


def after_id3(data: Bytes, at: int = 0) -> int:
    """Byte offset after the ID3v2 tags that begin at `at`, and after the zeros that pad them."""
    while data[at : at + 3] == b"ID3":
        header = data[at : at + 10]
        if len(header) < 10:
            break
        a, b, c, d = header[6:]  # seven bits each
        has_footer = header[5] & 0x10
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if has_footer else 0)
        padding = data[at : at + MAX_ID3_PADDING_BYTES]
        at += len(padding) - len(padding.lstrip(b"\0"))
    return min(at, len(data))
