"""KnOTS: task vectors merged in the singular basis that they share (Stoica et al. 2024, arXiv:2410.19735).

[d_1 | ... | d_K] = U S [V_1 | ... | V_K]^T, side by side along the input axis; the V_t are merged entry by entry and
U S V_merged^T is the merged task vector. combine ties: each V_t keeps its max(1, floor(density * n)) largest entries
(and ties of the last), the sign of sum_t w_t V_t is elected, those that agree are averaged by weight; where their
weights cancel there is 0. combine mean: sum_t w_t V_t / sum_t w_t, for which the basis cancels, so that it is the
weighted mean of the task vectors. Every 2-D tensor is a matrix, embeddings and heads too; others are averaged like
that. Memory beside the inputs: K + 5 tensors, and 3 times the square of min(out, K * in) in float64.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge._linalg import axes, cross, inverse, onto, sum_of_tasks, times
from fusion.merge._x import agreeing, choice, keep_counts, numbers

UNIT = "tensor"
NEUTRAL = {"density": 1.0, "scale": 1.0}


def knots(
    tensors: Tensor,  # (K, *shape)
    base: Tensor,  # (*shape)
    weights: Tensor,  # (K,)
    *,
    scale: float = 1.0,
    combine: Literal["ties", "mean"] = "ties",
    density: float | Sequence[float] = 0.2,
) -> Tensor:
    """(*shape) base + scale * the merged task vector.

    Raises ValueError for an unknown combine, a density outside [0, 1] and, where it has to divide by them, weights
    that add up to 0.
    """
    choice("knots", "combine", combine, ("ties", "mean"))
    densities = numbers(density, len(tensors), "density", 0, 1)
    if base.dim() != 2 or combine == "mean":
        whole = float(weights.double().sum())
        if whole == 0:
            raise ValueError(f"knots divides by the sum of the weights, and {weights.tolist()} add up to 0")
        return onto(base, sum_of_tasks(tensors, base, weights), scale / whole)
    models, (rows, columns) = len(tensors), base.shape
    if rows <= models * columns:
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=base.device)
        for tensor in tensors:
            task = (tensor - base).mT
            gram += cross(task, task)
        s, u = axes(gram, models * columns)
        u, s = u[:, s > 0], s[s > 0]
        parts = torch.empty(models, columns, len(s), device=base.device)
        for tensor, part in zip(tensors, parts):
            times((tensor - base).mT, u * inverse(s), out=part)
        return onto(base, times(_ties(parts, weights, densities), (u * s).mT).mT, scale)
    gram = torch.cat([torch.cat([cross(a - base, b - base) for b in tensors], 1) for a in tensors])
    s, v = axes(gram, rows)
    v = v[:, s > 0]
    merged = _ties(v.float().unflatten(0, (models, columns)), weights, densities).double()
    moved = torch.zeros_like(base)
    for tensor, part in zip(tensors, v.split(columns)):
        moved += times(tensor - base, part @ merged.mT)
    return onto(base, moved, scale)


def _ties(parts: Tensor, weights: Tensor, densities: list[float]) -> Tensor:  # (K, n, r), which it trims in place
    """(n, r) TIES of the parts."""
    size = parts[0].numel()
    if not size:
        return parts[0]
    for part, k in zip(parts, keep_counts(densities, [size] * len(parts))):
        least = part.abs().flatten().kthvalue(size - k + 1).values if k else torch.inf
        part.masked_fill_(part.abs() < least, 0.0)
    return agreeing(parts.flatten(1), weights, divide="weight").view_as(parts[0])
