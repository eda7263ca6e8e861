"""Positive scales by search, GPTQ, and the choice of forms by sensitivity."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="GPTQ uses torch")
pytest.importorskip("onnx", reason="export reads graphs with onnx")

from tiny_align.export.rounding import round_gptq, round_nearest
from tiny_align.export.sensitivity import Sensitivity
from tiny_align.export.weight_forms import Form, LlmWeights, Rounding

RNG = np.random.default_rng(0)


def dequantised(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    block = len(codes) // len(scales)
    return codes * np.repeat(scales.astype(np.float32), block, axis=0)


def plain(values: np.ndarray, block: int) -> np.ndarray:
    """The farthest weight of every block becomes 7, or -8."""
    blocks = values.reshape(-1, block, values.shape[1])
    scales = np.maximum(blocks.max(axis=1) / 7, -blocks.min(axis=1) / 8)[:, None]
    return (np.clip(np.rint(blocks / scales), -8, 7) * scales).reshape(values.shape)


@pytest.mark.parametrize("block", [32, 128])
def test_search_has_less_error_than_plain_rounding(block):
    values = RNG.standard_normal((256, 100)).astype(np.float32)
    codes, scales = round_nearest(values, 4, block)
    assert (scales > 0).all() and scales.dtype == np.float16
    error = np.square(values - dequantised(codes, scales)).sum()
    assert error < 0.9 * np.square(values - plain(values, block)).sum()


def test_blocks_of_zeros_and_of_one_value():
    values = np.zeros((64, 3), np.float32)
    values[5, 1] = -0.3
    values[:, 2] = 0.25
    codes, scales = round_nearest(values, 4, 32)
    np.testing.assert_allclose(dequantised(codes, scales), values, atol=1e-3)
    assert (scales > 0).all()


def test_importance_moves_the_error_to_other_inputs():
    values = RNG.standard_normal((64, 200)).astype(np.float32)
    importance = np.ones(64)
    importance[:4] = 1000
    errors = []
    for weights in (None, importance):
        codes, scales = round_nearest(values, 4, 32, weights)
        errors.append(np.square(values - dequantised(codes, scales))[:4].sum())
    assert errors[1] < 0.7 * errors[0]


def test_gptq_has_less_error_at_the_outputs_of_inputs_that_go_together():
    mixing = RNG.standard_normal((64, 64)) / 8 + 0.3
    inputs = RNG.standard_normal((2000, 64)) @ mixing
    values = RNG.standard_normal((64, 50)).astype(np.float32)
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    errors = []
    for codes, scales in (round_nearest(values, 4, 32), round_gptq(values, 4, 32, hessian)):
        errors.append(np.square(inputs @ (values - dequantised(codes, scales))).sum())
    assert errors[1] < 0.5 * errors[0]


def weights_of(sensitivities: dict[str, float], max_bits: float):
    """Matrices (64, 64) of these sensitivities: their weights, and the bits that they get."""
    matrices = {}
    means = {}
    for name, sensitivity in sensitivities.items():
        matrices[f"{name}.weight.T"] = RNG.standard_normal((64, 64)).astype(np.float32)
        means[name] = Sensitivity(np.full(64, sensitivity), np.ones(64))
    weights = LlmWeights(Form(4), Form(8), Rounding("nearest", means, max_bits))
    weights.choose_forms(matrices.items())
    bits = [weights.get(name, matrix, False).bits for name, matrix in matrices.items()]
    return weights, dict(zip(sensitivities, bits))


def test_sensitive_matrices_get_8_bits():
    weights, bits = weights_of({"a": 0.1, "b": 10, "c": 1, "d": 0.1}, max_bits=5.8)
    assert bits == {"a": 4, "b": 8, "c": 4, "d": 4}
    assert weights.bits == pytest.approx((3 * 4.5 + 8.5) / 4)  # INT8 in blocks of 64, twice


def test_robust_weights_stay_in_4_bits():
    _, bits = weights_of({"a": 1e-9, "b": 1e-8}, max_bits=9)
    assert bits == {"a": 4, "b": 4}


def test_weights_that_stand_side_by_side_have_one_form():
    left, right = RNG.standard_normal((2, 64, 64)).astype(np.float32)
    means = {
        "left": Sensitivity(np.full(64, 1e-9), np.ones(64)),
        "right": Sensitivity(np.full(64, 10.0), np.ones(64)),
    }
    weights = LlmWeights(Form(4), Form(8), Rounding("nearest", means, 9))
    joined = np.concatenate([left, right], axis=1)
    name = "left.weight.T+right.weight.T"
    weights.choose_forms([(name, joined)])
    assert weights.get(name, joined, False).bits == 8
