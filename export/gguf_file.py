"""GGUF, llama.cpp's format: what a file's header says, and its tensors as they are asked for.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read
and checked against the file's size before any tensor is. The package `gguf` knows the types of
blocks and dequantises them; its own reader takes seconds for a vocabulary and reads on beyond the
end of a file that is cut off.
"""

import contextlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tiny_align.export.model_folder import GGUF_MAGIC, damaged, is_lfs_pointer, one_line
from tiny_align.runtime.errors import TinyAlignError

VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, if the file names none
STRING = 8  # types of a field's value
ARRAY = 9
SCALARS = {  # the others -> how numpy writes them
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file, and how.

    Attributes:
        shape: as numpy writes it, rows first.
        start: of its bytes, in the file.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix (N, K) in blocks of 32 weights: `codes * scales + minima`, exactly, in float32.

    Attributes:
        codes: (N, K) int8. Of Q4_0 -8 to 7, of Q4_1 0 to 15, of Q8_0 -128 to 127. Q4_1's are not
            shifted to -8 to 7: eight scales more in a minimum would be rounded.
        scales: (N, K / 32) float16, negative ones among them.
        minima: (N, K / 32) float16; None if there are none.
        bits: 4 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    bits: int


@contextlib.contextmanager
def sensible_header(path: Path) -> Iterator[None]:
    """Within it, any error but ours is one of a header whose values make no sense.

    Wrong types and sizes make all kinds, in transformers' configurations too.

    Raises:
        TinyAlignError: there is such an error.
    """
    try:
        yield
    except TinyAlignError:
        raise
    except Exception as error:
        raise damaged(path, f"its header makes no LLM ({one_line(error)})") from error


class _EndOfFileError(Exception):
    """The header goes on beyond the end of the file."""


class GgufFile:
    """The header of a GGUF file, checked; tensors are read from the disk as they are asked for.

    Attributes:
        fields: the file's own names -> values; a list of an array of strings, else a numpy array.
        tensors: by the file's own names.
    """

    def __init__(self, path: Path):
        """Read the header.

        Raises:
            TinyAlignError: no GGUF file, of an unknown version, big-endian, cut off or damaged.
        """
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._offset = 0
        n_bytes = path.stat().st_size
        try:
            _check_beginning(path, n_bytes)
            with open(path, "rb") as opened:
                self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except OSError as error:
            raise damaged(path, error.strerror or one_line(error)) from error
        except _EndOfFileError as error:
            sizes = f"it ends within its header, after {n_bytes:,} bytes"
            raise damaged(path, f"it is cut off or damaged ({sizes})") from error
        except (ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise damaged(path, f"its header is damaged ({one_line(error)})") from error
        end = max((tensor.start + tensor.n_bytes for tensor in self.tensors.values()), default=0)
        if end > n_bytes:
            sizes = f"expected {end:,} bytes by its header, got {n_bytes:,} bytes"
            raise damaged(path, f"it is cut off ({sizes})")

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, float32."""
        tensor = self.tensors[name]
        values = dequantize(self._rows(tensor), tensor.kind)
        return values.astype(np.float32, copy=not values.flags.writeable).reshape(tensor.shape)

    def read_blocks(self, name: str) -> StoredBlocks | None:
        """A matrix as it is stored; None unless its type is Q4_0, Q4_1 or Q8_0."""
        tensor = self.tensors[name]
        split = BLOCKS.get(tensor.kind.name)
        if split is None or len(tensor.shape) != 2:
            return None
        n_rows, n_columns = tensor.shape
        block_bytes = GGML_QUANT_SIZES[tensor.kind][1]
        return split(self._rows(tensor).reshape(n_rows, -1, block_bytes), n_columns)

    def _rows(self, tensor: StoredTensor) -> np.ndarray:
        """Its bytes, a row of them for each row of the tensor."""
        data = np.frombuffer(self._bytes, np.uint8, tensor.n_bytes, tensor.start)
        return data.reshape(*tensor.shape[:-1], -1)

    # --- the header ---

    def _read_header(self) -> None:
        self._offset = 8  # after magic and version
        n_tensors = self._scalar("<u8")
        n_fields = self._scalar("<u8")
        for _ in range(n_fields):
            name = self._string()
            self.fields[name] = self._value(self._scalar("<u4"))
        tensors = [self._tensor() for _ in range(n_tensors)]
        alignment = int(self.fields.get("general.alignment", ALIGNMENT))
        if alignment <= 0:
            raise ValueError(f"tensors aligned to {alignment} bytes")
        data_start = math.ceil(self._offset / alignment) * alignment
        for name, kind, shape, offset in tensors:
            n_bytes = self._n_bytes(name, kind, shape)
            self.tensors[name] = StoredTensor(name, kind, shape, data_start + offset, n_bytes)
        if len(self.tensors) < n_tensors:
            raise ValueError("two tensors have one name")

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """A tensor's name, type, shape, and where it begins among the tensors' bytes."""
        name = self._string()
        n_dims = self._scalar("<u4")
        shape = tuple(self._array("<u8", n_dims).tolist())
        kind = self._scalar("<u4")
        offset = self._scalar("<u8")
        try:
            return name, GGMLQuantizationType(kind), shape[::-1], offset
        except ValueError as error:
            raise ValueError(f"{name} is of the unknown type {kind}") from error

    def _n_bytes(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} is {list(shape)}, in blocks of {block}")
        return math.prod(shape) // block * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner = self._scalar("<u4")
        length = self._scalar("<u8")
        if inner in SCALARS:
            return self._array(SCALARS[inner], length)
        return [self._value(inner) for _ in range(length)]

    def _scalar(self, dtype: str) -> Any:
        return self._array(dtype, 1).item()

    def _array(self, dtype: str, length: int) -> np.ndarray:
        n_bytes = np.dtype(dtype).itemsize * length
        start = self._advance(n_bytes)
        return np.frombuffer(self._bytes, dtype, length, start)

    def _string(self) -> str:
        length = self._scalar("<u8")
        start = self._advance(length)
        return self._bytes[start : start + length].decode("utf-8")

    def _advance(self, n_bytes: int) -> int:
        """Where the next bytes begin; go on to what follows them."""
        start = self._offset
        if start + n_bytes > len(self._bytes):
            raise _EndOfFileError
        self._offset += n_bytes
        return start


def _check_beginning(path: Path, n_bytes: int) -> None:
    """Refuse what is no GGUF file of a known version in this machine's byte order."""
    with open(path, "rb") as opened:
        beginning = opened.read(8)
    if n_bytes == 0:
        raise damaged(path, "the file is empty")
    if is_lfs_pointer(path):
        why = "the file is a Git LFS pointer, not the file itself"
        raise damaged(path, why, "Run `git lfs pull` in its folder, or download it again")
    if beginning[:4] != GGUF_MAGIC or len(beginning) < 8:
        why = f"expected a GGUF file, which begins with {GGUF_MAGIC!r}, got {beginning[:4]!r}"
        raise damaged(path, why)
    (version,) = struct.unpack("<I", beginning[4:])
    if version & 0xFFFF == 0:
        raise TinyAlignError(
            f"{path} is a big-endian GGUF file: give a little-endian one, or convert it with "
            "`gguf-convert-endian FILE little`"
        )
    if version not in VERSIONS:
        raise TinyAlignError(
            f"{path} is GGUF version {version}, expected 2 or 3: convert the model again into "
            "version 3, which llama.cpp writes"
        )


# --- blocks ---


def _q4_0(blocks: np.ndarray, n_columns: int) -> StoredBlocks:
    codes = _nibbles(blocks[..., 2:]) - 8
    return StoredBlocks(codes.reshape(-1, n_columns), _float16(blocks, 0), None, 4)


def _q4_1(blocks: np.ndarray, n_columns: int) -> StoredBlocks:
    codes = _nibbles(blocks[..., 4:]).reshape(-1, n_columns)
    return StoredBlocks(codes, _float16(blocks, 0), _float16(blocks, 2), 4)


def _q8_0(blocks: np.ndarray, n_columns: int) -> StoredBlocks:
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return StoredBlocks(codes.reshape(-1, n_columns), _float16(blocks, 0), None, 8)


# Type -> what splits (N, blocks, bytes) uint8 and the number of columns.
BLOCKS: dict[str, Callable[[np.ndarray, int], StoredBlocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(..., 16) bytes -> (..., 32) int8, 0 to 15: the low halves of all come first."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8)


def _float16(blocks: np.ndarray, offset: int) -> np.ndarray:
    """(N, blocks): the float16 at an offset of each block."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view(np.float16)[..., 0]
