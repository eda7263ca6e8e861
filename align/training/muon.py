"""Muon: momentum whose every matrix is made orthogonal before it is taken as a step (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon. PyTorch's own works in bfloat16, which costs seconds a step on a CPU that
has no instructions for it; this one works in float32.
"""

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5  # of Newton and Schulz
POLYNOMIAL = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan's: singular values end between .7 and 1.2, soon rather than exactly
LIKE_ADAM = 0.2  # root mean square of a step, in units of the rate: then Adam's rates serve (arXiv 2502.16982)


def orthogonal(matrix: Tensor) -> Tensor:
    """(A, B) -> (A, B): all singular values about 1, the singular vectors as they were."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = POLYNOMIAL
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if len(matrix) > matrix.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions and more; those beyond the first count as one."""

    def __init__(self, parameters, rate: float = 1e-3):
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                ahead = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)  # as Nesterov's
                size = LIKE_ADAM * max(ahead.shape) ** 0.5
                parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * size)
