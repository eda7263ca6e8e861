"""The variables in a model.bin, CTranslate2's format: name -> array."""

import struct
from pathlib import Path

import numpy as np

from tiny_align.runtime.errors import TinyAlignError

VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Reader:
    """Takes values from the beginning of a file's bytes, one after another."""

    def __init__(self, data: bytes):
        self._data = data
        self._position = 0

    def number(self, kind: str) -> int:
        """An unsigned integer; kind "B": 8 bits, "H": 16, "I": 32."""
        (value,) = struct.unpack("<" + kind, self.take(struct.calcsize(kind)))
        return int(value)

    def text(self) -> str:
        """A name: its length, its bytes, a zero."""
        return self.take(self.number("H"))[:-1].decode("utf-8")

    def take(self, n_bytes: int) -> bytes:
        start = self._position
        self._position += n_bytes
        return self._data[start : self._position]


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model.bin; one that stands for another is left out.

    Raises:
        TinyAlignError: a file of another version.
    """
    reader = _Reader(path.read_bytes())
    version = reader.number("I")
    if version != VERSION:
        raise TinyAlignError(f"{path} has version {version}: expected CTranslate2's {VERSION}")
    reader.text()  # "WhisperSpec"
    reader.number("I")  # the revision of that
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        dtype = DTYPES[reader.number("B")]
        data = reader.take(reader.number("I"))
        variables[name] = np.frombuffer(bytearray(data), dtype).reshape(shape)
    return variables
