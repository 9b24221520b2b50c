"""Task arithmetic: the base plus a weighted sum of task vectors (Ilharco et al. 2022, arXiv:2212.04089)."""

import torch
from torch import Tensor

from fusion.merge import _x

NEUTRAL = {"scale": 1.0}


def task_arithmetic(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    scale: float = 1.0,
) -> Tensor:
    """(n,) base + scale * sum w (t - base); weights are not divided by their sum, and a negative one forgets a task."""
    vector, part = torch.zeros_like(base), torch.empty_like(base)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        vector.add_(torch.sub(tensor, base, out=part), alpha=weight)
    return _x.scaled(base, vector, scale)
