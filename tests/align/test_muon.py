"""align/training/muon.py: steps in matrices whose singular values are about 1."""

import copy

import numpy as np
import pytest
import torch

from tiny_align.align.training.muon import LIKE_ADAM, Muon, orthogonal


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (1, 7)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_orthogonal_gives_singular_values_of_about_one_and_keeps_the_vectors(shape, size):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    product = left.T @ orthogonal(size * matrix) @ right.T  # diagonal, and near 1
    values = product.diagonal().numpy()
    assert ((values > 0.6) & (values < 1.3)).all()
    np.testing.assert_allclose(product.numpy(), np.diag(values), atol=1e-3)


def test_a_step_is_as_large_as_one_of_adam():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    weight.grad = 1e-4 * torch.randn(32, 64)
    Muon([weight], rate=0.01).step()
    # of an orthogonal (A, B), A < B: 1 / sqrt(B)
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.01 * LIKE_ADAM, rel=0.25)


def test_a_convolution_kernel_counts_as_the_matrix_of_its_rows():
    torch.manual_seed(0)
    flat = torch.nn.Parameter(torch.zeros(4, 6))
    kernel = torch.nn.Parameter(torch.zeros(4, 3, 2))
    flat.grad = torch.randn(4, 6)
    kernel.grad = flat.grad.view(4, 3, 2)
    Muon([flat, kernel]).step()
    assert torch.equal(flat, kernel.flatten(1)) and flat.abs().min() > 0


def test_momentum_outweighs_one_opposite_gradient():
    """One gradient against nineteen does not turn the step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    gradient = torch.randn(8, 8)
    optimiser = Muon([weight])
    for _ in range(19):
        weight.grad = gradient
        optimiser.step()
    before = weight.detach().clone()
    weight.grad = -0.5 * gradient
    optimiser.step()
    assert ((weight - before) * gradient).sum() < 0


def test_parameters_without_a_gradient_do_not_change():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    Muon([weight]).step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_a_loaded_state_continues_with_the_same_steps():
    torch.manual_seed(0)
    gradients = torch.randn(4, 3, 5)
    first = torch.nn.Parameter(torch.zeros(3, 5))
    second = torch.nn.Parameter(torch.zeros(3, 5))
    one = Muon([first])
    other = Muon([second])
    for gradient in gradients[:2]:
        first.grad = gradient
        one.step()
    second.data.copy_(first.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # PyTorch's shares the tensors
    for gradient in gradients[2:]:
        first.grad = second.grad = gradient
        one.step()
        other.step()
    assert torch.equal(first, second)
