"""Iso-CTS: Iso-C with room for what single models have to say (Marczak et al. 2025, arXiv:2502.04959).

Of r = min(shape) directions the leading k of sum_t w_t d_t are common; the others are shared evenly by the models,
which fill theirs with the leading singular triplets of (I - U_k U_k^T) w_t d_t. All left and all right vectors side
by side are replaced by their polar factors, all singular values by their mean. k is common_fraction * r, moved to the
nearest number that leaves a multiple of K. Triplets that do not exist (rank deficiency) stay out, of the mean too.
Every 2-D tensor is a matrix, embeddings and heads too; all others get base + scale * mean_t(w_t d_t).
Memory beside the inputs: 4 tensors, and 6 times the square of the shorter side in float64.
"""

import torch
from torch import Tensor

from fusion.merge._linalg import (
    axes,
    cross,
    inverse,
    inverse_root,
    mean_task,
    onto,
    squared_norm,
    sum_of_tasks,
    tall,
    times,
)

UNIT = "tensor"


def iso_cts(
    tensors: Tensor,  # (K, *shape)
    base: Tensor,  # (*shape)
    weights: Tensor,  # (K,)
    *,
    scale: float = 1.0,
    common_fraction: float = 0.8,
) -> Tensor:
    """(*shape) the base moved along common and task-specific directions, all equally far.

    Raises ValueError when common_fraction is outside [0, 1].
    """
    if not 0 <= common_fraction <= 1:
        raise ValueError(f"common_fraction is {common_fraction}; it is the share of directions in common, from 0 to 1")
    if base.dim() != 2:
        return mean_task(tensors, base, weights, scale)
    r, models = min(base.shape), len(tensors)
    own = min(round((r - int(r * common_fraction)) / models), r // models)
    common = r - own * models
    start = tall(base)
    rows = len(start)
    left = torch.empty(rows, r, dtype=torch.float32, device=base.device)
    values, right = [], []

    def add(matrix: Tensor, count: int, first: int, beside: float = 0.0) -> Tensor:
        s, v = axes(cross(matrix, matrix), rows, beside)
        s, v = s[:count], v[:, :count] * (s[:count] > 0)
        times(matrix, v * inverse(s), out=left[:, first : first + count])
        values.append(s)
        right.append(v)
        return v

    v = add(tall(sum_of_tasks(tensors, base, weights)), common, 0)
    u = left[:, :common]
    for t, (tensor, weight) in enumerate(zip(tensors, weights)):
        task = (tall(tensor) - start).mul_(weight)
        size = squared_norm(task if start is base else task.mT) ** 0.5
        if start is base:
            task -= times(u, cross(u, task))
        else:  # the rows of the view are the columns of the tensor: its left vectors are v
            times(task, torch.eye(r, dtype=torch.float64, device=base.device) - v @ v.mT, out=task)
        add(task, own, common + t * own, size)
    s, v = torch.cat(values), torch.cat(right, 1)
    mean = s.sum() / (s > 0).sum().clamp(min=1)
    core = mean * inverse_root(cross(left, left), rows) @ (v @ inverse_root(v.mT @ v, r)).mT
    merged = times(left, core)
    return onto(base, merged if start is base else merged.mT, scale)
