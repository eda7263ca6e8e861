"""The LLM's embedding table: in FP16, or in INT8 with a scale for every few values.

A table in INT8 is the output layer's weight as well where the LLM ties the two: ONNX Runtime's
graph reads it in the same files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import read_array

EMBEDDINGS = "token_embeddings.npy"  # (V, D) float16, or uint8: 128 more than the code
SCALES = "token_embeddings.scales.npy"  # (V, D / block) float16, beside uint8
ZERO = 128  # the uint8 that is the code 0


@dataclass(frozen=True)
class EmbeddingTable:
    """(V, D) values, mapped; a row is read when it is asked for."""

    codes: np.ndarray
    scales: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, ids: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """(T, D) float32 rows of token ids; by default all (V, D)."""
        codes = self.codes[ids]
        if self.scales is None:
            return codes.astype(np.float32)
        scales = self.scales[ids].astype(np.float32)
        n_rows, n_blocks = scales.shape
        blocks = codes.reshape(n_rows, n_blocks, -1).astype(np.float32)
        blocks -= np.float32(ZERO)
        blocks *= scales[:, :, None]
        return blocks.reshape(n_rows, -1)


def load_table(folder: Path, size: int | None = None) -> EmbeddingTable:
    """The table in a bundle's folder.

    Args:
        size: D by the manifest; None: not known yet.
    Raises:
        BundleError: a file cannot be read, or is of another size.
    """
    path = folder / EMBEDDINGS
    codes = read_array(path, BundleError, mmap_mode="r")
    is_codes = codes.dtype == np.uint8
    is_table = codes.ndim == 2 and (is_codes or codes.dtype.kind == "f")
    if not is_table or (size is not None and codes.shape[1] != size):
        columns = "columns" if size is None else f"{size} columns, as many as the manifest says"
        raise BundleError(
            f"{path} is {codes.dtype} {list(codes.shape)}, expected floats of {columns}: "
            "export the bundle again"
        )
    if not is_codes:
        return EmbeddingTable(codes)
    scales = read_array(folder / SCALES, BundleError, mmap_mode="r")
    fits = scales.ndim == 2 and len(scales) == len(codes) and scales.dtype.kind == "f"
    if not fits or scales.shape[1] == 0 or codes.shape[1] % scales.shape[1]:
        raise BundleError(
            f"{folder / SCALES} is {scales.dtype} {list(scales.shape)}, expected a float for every "
            f"few of the {list(codes.shape)} values in {EMBEDDINGS}: export the bundle again"
        )
    return EmbeddingTable(codes, scales)
