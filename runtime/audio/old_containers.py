"""Where the samples of containers that few people still have must end, by what their headers promise.

Each function takes a whole file and gives the byte offset of its end, or None where the header does not say. A header
that is itself cut off raises struct.error, LookupError or ValueError.
"""

import re
import struct


def _avr_end(data: bytes) -> int:
    is_stereo, bits, n_samples = struct.unpack_from(">12x2H10xI", data)
    return 128 + n_samples * (2 if is_stereo else 1) * bits // 8


def _nist_end(data: bytes) -> int | None:
    header = data[: int(data[8:16])].decode("latin-1")
    if "end_head" not in header:
        raise ValueError("cut off in its header")
    values = dict(re.findall(r"^(\w+) -i (\d+)", header, re.MULTILINE))
    if "sample_count" not in values or "shorten" in header:
        return None
    width = int(values.get("channel_count", 1)) * int(values.get("sample_n_bytes", 1))
    return len(header) + int(values["sample_count"]) * width


def _voc_end(data: bytes) -> int:
    """Blocks, each of a kind and a size of three bytes, until one of kind 0 or the end."""
    at = struct.unpack_from("<20xH", data)[0]
    while at < len(data) and data[at]:
        at += 4 + int.from_bytes(data[at + 1 : at + 4].ljust(3, b"\xff"), "little")
    return at


def _wve_end(data: bytes) -> int:
    return 32 + struct.unpack_from(">18xI", data)[0]


def _mpc_end(data: bytes) -> int:
    is_stereo, n_samples = struct.unpack_from("<21xB8xI", data)
    return 42 + n_samples * (2 if is_stereo else 1) * 2


def _xi_end(data: bytes) -> int | None:
    n_bytes = struct.unpack_from("<298xI", data)[0]
    return 338 + n_bytes if n_bytes else None


def _sds_end(data: bytes) -> int:
    """Packets of 127 bytes; a sample takes two, three or four of the 120 that count."""
    bits, n_samples = data[6], data[10] | data[11] << 7 | data[12] << 14
    per_packet = 120 // (2 if bits <= 14 else 3 if bits <= 21 else 4)
    return 21 + 127 * -(-n_samples // per_packet)


def _mat4_end(data: bytes) -> int:
    """Two matrices: the rate and the samples."""
    order, end = "<" if data[:4] == bytes(4) else ">", 0
    for _ in range(2):
        kind, rows, columns, _, name_bytes = struct.unpack_from(order + "5I", data, end)
        end += 20 + name_bytes + rows * columns * (8, 4, 4, 2, 2, 1)[kind // 10 % 10]
    return end


def _mat5_end(data: bytes) -> int:
    """Two matrices, the rate and the samples; flags, dimensions, a name and then the values are in each."""
    order = "<" if data[126:128] == b"IM" else ">"
    end = 128 + 8 + struct.unpack_from(order + "4xI", data, 128)[0] + 8
    for _ in range(3):
        kind, size = struct.unpack_from(order + "2I", data, end)
        end += (
            8 if kind >> 16 else 8 + -(-size // 8) * 8
        )  # a small element has its content in its header
    return end + 8 + struct.unpack_from(order + "4xI", data, end)[0]


def _nowhere(_: bytes) -> None:
    """These containers have no length."""


PROMISED_END = {  # first bytes -> what gives the end that a header promises
    b"NIST_1A": _nist_end,
    b"Creative Voice File": _voc_end,
    b"2BIT": _avr_end,
    b"ALawSoundFile**": _wve_end,
    b"\x01\x04": _mpc_end,
    b"Extended Instrument: ": _xi_end,
    b"\xf0\x7e": _sds_end,
    b"MATLAB 5.0 MAT-file": _mat5_end,
    bytes(4) + b"\1\0\0\0\1\0\0\0": _mat4_end,
    b"\0\0\x03\xe8\0\0\0\1\0\0\0\1": _mat4_end,
    b"PVF1": _nowhere,
    b" paf": _nowhere,
    b"fap ": _nowhere,
    b"\x64\xa3": _nowhere,  # IRCAM, in both byte orders
    **{bytes([0, machine]) + b"\xa3\x64": _nowhere for machine in range(1, 5)},
}
