"""Weights in blocks of integers: positive scales by search, codes rounded to nearest or by GPTQ.

A block is a run of weights of one output along its inputs. It is stored as codes and one scale:
weight = code * scale. Scales are positive and have 16 bits, which TensorRT and ONNX Runtime both
take. Arrays here are (K, N): K inputs, N outputs.
"""

import numpy as np

MAX_CODE = {4: 7, 8: 119}  # 119 = 16 * 7 + 7: two INT4 codes hold it, see quantise.py
MIN_CODE = {4: -8, 8: -119}
# The farthest weight of a block over the scale: a smaller scale cuts it off, for the others' good.
CANDIDATES = {4: np.linspace(6.25, 9.75, 8, dtype=np.float32), 8: np.array([119], np.float32)}
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_SCALE = float(np.finfo(np.float16).max) / 16  # 16 times a scale is stored too
TILE = 4096  # columns worked on at once: they fit the processor's cache
DAMPING = 0.01  # this share of the inputs' mean importance is added to each
SMALLEST_IMPORTANCE = 1e-12


def round_nearest(
    values: np.ndarray, bits: int, block: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round every weight to its nearest code.

    Args:
        values: (K, N) float32, K a multiple of `block`.
        importance: (K,), of an input's error in the choice of scales; None: all alike.
    Returns:
        Codes (K, N) int8 and scales (K / block, N) float16.
    """
    if importance is not None:  # inputs that were never there may come
        importance = importance + DAMPING * importance.mean() + SMALLEST_IMPORTANCE
    n_blocks = len(values) // block
    codes = np.empty(values.shape, np.int8)
    scales = np.empty((n_blocks, values.shape[1]), np.float16)
    for row in range(n_blocks):
        inputs = slice(row * block, (row + 1) * block)
        weight = None if importance is None else importance[inputs]
        for column in range(0, values.shape[1], TILE):
            outputs = slice(column, column + TILE)
            tile = np.ascontiguousarray(values[inputs, outputs], np.float32)
            scales[row, outputs] = search_scales(tile, bits, weight)
            codes[inputs, outputs] = nearest_codes(tile, scales[row, outputs], bits)
    return codes, scales


def search_scales(rows: np.ndarray, bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """The positive scale of every block, of least squared error among the candidates.

    The codes of a candidate fix the best scale for them, by least squares (as llama.cpp's
    make_qx_quants does, whose scales have any sign).

    Args:
        rows: (block, N) float32, a block in every column.
        importance: (block,) weights of the squares.
    Returns:
        (N,) float16.
    """
    farthest = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    weighted = rows if importance is None else rows * importance[:, None].astype(np.float32)
    gains = np.full(rows.shape[1], -1, np.float32)
    scales = farthest / MAX_CODE[bits]
    for candidate in CANDIDATES[bits]:
        codes = rows * (candidate / farthest)
        np.rint(codes, out=codes)
        np.clip(codes, MIN_CODE[bits], MAX_CODE[bits], out=codes)
        products = np.einsum("kn,kn->n", codes, weighted)
        if importance is None:
            squares = np.einsum("kn,kn->n", codes, codes)
        else:
            squares = np.einsum("kn,kn,k->n", codes, codes, importance)
        squares = np.maximum(squares, 1e-30)
        gain = products * np.maximum(products, 0) / squares  # what is left of the square falls by
        better = gain > gains
        gains[better] = gain[better]
        scales[better] = (products / squares)[better]
    return np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float16)


def nearest_codes(rows: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """(block, N) int8: the nearest codes at scales (N,)."""
    codes = np.rint(rows / scales.astype(np.float32))
    return np.clip(codes, MIN_CODE[bits], MAX_CODE[bits]).astype(np.int8)


def round_gptq(
    values: np.ndarray, bits: int, block: int, hessian: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round input by input; the inputs that follow make up for the error (GPTQ, arXiv 2210.17323).

    The scale of a block is found when it is reached, for the weights as they are then.

    Args:
        values: (K, N) float32, K a multiple of `block`.
        hessian: (K, K) float32, mean products of the inputs.
    Returns:
        Codes (K, N) int8 and scales (K / block, N) float16.
    """
    import torch  # whose Cholesky factors and products are quick

    weights = torch.from_numpy(np.array(values, np.float32))
    damped = torch.from_numpy(np.array(hessian, np.float32))
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + SMALLEST_IMPORTANCE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    importance = damped.diagonal().numpy()
    codes = np.empty(values.shape, np.int8)
    scales = np.empty((len(values) // block, values.shape[1]), np.float16)
    for row in range(len(scales)):
        first = row * block
        last = first + block
        rows = weights[first:last]
        scales[row] = search_scales(rows.numpy(), bits, importance[first:last])
        scale = torch.from_numpy(scales[row].astype(np.float32))
        errors = torch.empty_like(rows)
        for k in range(block):
            code = torch.clamp(torch.round(rows[k] / scale), MIN_CODE[bits], MAX_CODE[bits])
            codes[first + k] = code.numpy().astype(np.int8)
            factors = upper[first + k, first + k : last]
            errors[k] = (rows[k] - code * scale) / factors[0]
            rows[k:] -= torch.outer(factors, errors[k])
        weights[last:] -= upper[first:last, last:].T @ errors
    return codes, scales
