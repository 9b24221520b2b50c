"""OPCM: models one after another, each projected off what is already merged (Tang et al. 2025, arXiv:2501.09522).

tau_1 = d_1; then tau_t = (lambda_{t-1} tau_{t-1} + P(d_t)) / lambda_t. In the singular bases of tau_{t-1}, P removes
from d_t the diagonal and the leading k x k block, where the first k singular values make up at most `alpha` of the sum
of all. lambda_t is such that |tau_t| is the mean of |d_1| ... |d_t|, tensor by tensor (the paper takes these norms
over the whole model, which would need every task vector before the first tensor is written). lambda_1 = 1.
The order of the models matters. Tensors that are no matrix take P(d) = d. A 2-D tensor is a matrix, embeddings too.
Memory, however many models: the model being added, and 4 tensors; 5 times the square of the shorter side in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fusion.merge._linalg import axes, cross, inverse, squared_norm, tall, times

UNIT = "tensor"
SEQUENTIAL = True
SYMMETRIC = False
NEUTRAL: dict[str, float] = {}


def opcm(tensors: Iterator[Tensor], base: Tensor, *, alpha: float = 0.5) -> Tensor:  # each (*shape)
    """(*shape) the base moved by the models' task vectors in turn. Raises ValueError when alpha is outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is a share of the sum of singular values, from 0 to 1")
    merged, weight, length, seen = torch.zeros_like(base), 1.0, 0.0, 0
    for tensor in tensors:
        task = tensor - base
        length += squared_norm(task) ** 0.5
        seen += 1
        if seen == 1:
            merged = task
            continue
        if base.dim() == 2:
            _project(tall(task), tall(merged), alpha)
        merged.mul_(weight).add_(task)
        norm = squared_norm(merged) ** 0.5
        if norm > 0 and length > 0:
            weight = norm * seen / length
            merged.div_(weight)
    return merged.add_(base)


def _project(task: Tensor, merged: Tensor, alpha: float) -> None:  # (m, n) each, m >= n
    """Takes from `task`, in place, what lies in the leading block and on the diagonal of merged's singular bases."""
    s, v = axes(cross(merged, merged), len(merged))
    u = times(merged, v * inverse(s))
    core = cross(u, task) @ (v * (s > 0))
    leading = int((s.cumsum(0) <= alpha * s.sum()).sum())
    removed = core.diagonal().diag()
    removed[:leading, :leading] = core[:leading, :leading]
    task.sub_(times(u, removed @ v.mT))
