"""WUDI: the task vector that interferes least with all the others' inputs, found without data (Cheng et al. 2025,
arXiv:2503.08099).

A linear layer's task vector d_t spans about the subspace of its inputs, so sum_t |(tau - d_t) d_t^T|^2 / |d_t|^2
measures what a merged tau gets wrong. Adam starts at tau = sum_t d_t; its constant learning rate bounds how far any
entry moves (about steps * learning_rate). The objective is quadratic: with its curvature computed once, a step is one
product of tau with an (in, in) matrix, however many models there are. One model comes out as itself.
Every 2-D tensor counts as a linear layer, embeddings and heads too (steps: 0 for them leaves the sum); all others get
base + mean_t d_t. No random numbers. Memory beside the inputs: 6 tensors, and three times the square of the input
side in float64.
"""

import torch
from torch import Tensor

from fusion.merge._linalg import cross, mean_task, squared_norm, sum_of_tasks, times

UNIT = "tensor"
NEUTRAL: dict[str, float] = {}
BETAS, EPSILON = (0.9, 0.999), 1e-8


def wudi(
    tensors: Tensor,  # (K, *shape)
    base: Tensor,  # (*shape)
    *,
    steps: int = 300,
    learning_rate: float = 1e-5,
) -> Tensor:
    """(*shape) base + tau after `steps` steps of Adam. Raises ValueError when either parameter is below 0."""
    if steps < 0 or learning_rate < 0:
        raise ValueError(f"wudi got steps {steps} and learning_rate {learning_rate}; neither may be below 0")
    ones = torch.ones(len(tensors))
    if base.dim() != 2:
        return mean_task(tensors, base, ones, 1.0)
    start = sum_of_tasks(tensors, base, ones)
    curvature = torch.zeros(base.shape[1], base.shape[1], dtype=torch.float64, device=base.device)
    target = torch.zeros_like(base)
    for tensor in tensors:
        task = tensor - base
        square = squared_norm(task)
        if square > 0:
            gram = cross(task, task) / square
            curvature += gram
            target += times(task.sub_(start), gram)
    return start.add_(_adam(curvature.float(), target, steps, learning_rate)).add_(base)


def _adam(curvature: Tensor, target: Tensor, steps: int, rate: float) -> Tensor:  # (n, n), (m, n)
    """(m, n) x, from 0, after Adam's steps on the quadratic whose gradient is 2 (x curvature - target)."""
    x, mean, square = torch.zeros_like(target), torch.zeros_like(target), torch.zeros_like(target)
    for step in range(1, steps + 1):
        gradient = torch.addmm(target, x, curvature, beta=-2, alpha=2)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        torch.sqrt(square, out=gradient).div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
        x.addcdiv_(mean, gradient, value=-rate / (1 - BETAS[0] ** step))
    return x
