"""Where the samples of rarely used containers must end, according to their headers.

Each function takes a whole file and returns the byte offset of its end, or None if the header does
not give it. If the header itself is cut off, they raise struct.error, LookupError or ValueError.
"""

import re
import struct
from collections.abc import Callable


def avr_end(data: bytes) -> int:
    is_stereo, bits, n_samples = struct.unpack_from(">12x2H10xI", data)
    n_channels = 2 if is_stereo else 1
    return 128 + n_samples * n_channels * bits // 8


def nist_end(data: bytes) -> int | None:
    header = data[: int(data[8:16])].decode("latin-1")
    if "end_head" not in header:
        raise ValueError("cut off in its header")
    values = dict(re.findall(r"^(\w+) -i (\d+)", header, re.MULTILINE))
    if "sample_count" not in values or "shorten" in header:
        return None
    n_channels = int(values.get("channel_count", 1))
    sample_bytes = int(values.get("sample_n_bytes", 1))
    return len(header) + int(values["sample_count"]) * n_channels * sample_bytes


def voc_end(data: bytes) -> int:
    """Walk blocks, each with a kind and a size of three bytes, until one of kind 0 or the end."""
    at = struct.unpack_from("<20xH", data)[0]
    while at < len(data) and data[at]:
        at += 4 + int.from_bytes(data[at + 1 : at + 4].ljust(3, b"\xff"), "little")
    return at


def wve_end(data: bytes) -> int:
    return 32 + struct.unpack_from(">18xI", data)[0]


def mpc_end(data: bytes) -> int:
    is_stereo, n_samples = struct.unpack_from("<21xB8xI", data)
    n_channels = 2 if is_stereo else 1
    return 42 + n_samples * n_channels * 2


def xi_end(data: bytes) -> int | None:
    n_bytes = struct.unpack_from("<298xI", data)[0]
    return 338 + n_bytes if n_bytes else None


def sds_end(data: bytes) -> int:
    """Packets of 127 bytes hold 120 of samples; a sample takes two, three or four of them."""
    bits = data[6]
    n_samples = data[10] | data[11] << 7 | data[12] << 14
    if bits <= 14:
        sample_bytes = 2
    elif bits <= 21:
        sample_bytes = 3
    else:
        sample_bytes = 4
    n_packets = -(-n_samples // (120 // sample_bytes))  # rounded up
    return 21 + 127 * n_packets


def mat4_end(data: bytes) -> int:
    """Skip two matrices, the rate and the samples."""
    order = "<" if data[:4] == bytes(4) else ">"
    end = 0
    for _ in range(2):
        kind, rows, columns, _, name_bytes = struct.unpack_from(order + "5I", data, end)
        value_bytes = (8, 4, 4, 2, 2, 1)[kind // 10 % 10]
        end += 20 + name_bytes + rows * columns * value_bytes
    return end


def mat5_end(data: bytes) -> int:
    """Skip two matrices, the rate and the samples.

    In each are flags, dimensions, a name and then the values.
    """
    order = "<" if data[126:128] == b"IM" else ">"
    end = 128 + 8 + struct.unpack_from(order + "4xI", data, 128)[0] + 8
    for _ in range(3):
        kind, size = struct.unpack_from(order + "2I", data, end)
        is_small = kind >> 16  # its content is in its header
        end += 8 if is_small else 8 + -(-size // 8) * 8
    return end + 8 + struct.unpack_from(order + "4xI", data, end)[0]


def unknown_end(_data: bytes) -> None:
    """The end in containers that have no length."""


PROMISED_END: dict[bytes, Callable[[bytes], int | None]] = {  # first bytes -> where the end is
    b"NIST_1A": nist_end,
    b"Creative Voice File": voc_end,
    b"2BIT": avr_end,
    b"ALawSoundFile**": wve_end,
    b"\x01\x04": mpc_end,
    b"Extended Instrument: ": xi_end,
    b"\xf0\x7e": sds_end,
    b"MATLAB 5.0 MAT-file": mat5_end,
    bytes(4) + b"\1\0\0\0\1\0\0\0": mat4_end,
    b"\0\0\x03\xe8\0\0\0\1\0\0\0\1": mat4_end,
    b"PVF1": unknown_end,
    b" paf": unknown_end,
    b"fap ": unknown_end,
    b"\x64\xa3": unknown_end,  # IRCAM, in both byte orders
    b"\0\1\xa3\x64": unknown_end,
    b"\0\2\xa3\x64": unknown_end,
    b"\0\3\xa3\x64": unknown_end,
    b"\0\4\xa3\x64": unknown_end,
}
