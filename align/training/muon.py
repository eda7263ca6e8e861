"""Muon: a step is the momentum, each of its matrices made orthogonal first.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. PyTorch's own computes in bfloat16,
which takes seconds a step on a CPU without instructions for it; this one computes in float32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5  # of Newton and Schulz
# Jordan's: singular values end between .7 and 1.2, after few iterations rather than exactly at 1
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
# root mean square of a step in units of the rate, so that Adam's rates serve (arXiv 2502.16982)
LIKE_ADAM = 0.2


def orthogonal(matrix: Tensor) -> Tensor:
    """(A, B) -> (A, B): all singular values about 1, the singular vectors unchanged."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if len(matrix) > matrix.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions or more; those beyond the first count as one."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rate: float = 1e-3):
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's momentum
        scale = LIKE_ADAM * max(ahead.shape) ** 0.5
        parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-rate * scale)
