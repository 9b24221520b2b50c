"""Consensus merging with TALL masks: weights that fewer than k tasks use are left at the base (Wang et al. 2024,
arXiv:2405.07813)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.merge._x import Outputs, Sum, deltas, numbers, scaled, summed

NEUTRAL = {"agree": 1}


def consensus(
    tensors: Tensor,  # (K, n)
    base: Tensor,
    weights: Tensor,
    *,
    ratio: float | Sequence[float] = 0.6,
    agree: int = 2,
    scale: float = 1.0,
) -> Outputs:
    """(n,) base + scale tau where at least `agree` models use the weight, tau = sum w_t d_t.

    Model t uses a weight where |d_t| > ratio_t |tau - d_t| (its TALL mask; a larger ratio makes a sparser one). Raises
    ValueError when `agree` is not among 1..K.
    """
    if not 1 <= agree <= len(tensors):
        raise ValueError(f"consensus: agree counts models, 1 to {len(tensors)} of them here, and is {agree}")
    ratios = numbers(ratio, len(tensors), "ratio", low=0.0)
    d = deltas(tensors, base)
    tau = summed(d, weights, "none")
    masks = torch.stack([one.abs().gt_((tau - one).abs_().mul_(share)) for share, one in zip(ratios, d, strict=True)])
    agreed = masks.sum(0).ge_(agree)
    return Outputs(scaled(base, tau.mul_(agreed), scale), {"kept": Sum(torch.count_nonzero(masks.mul_(agreed), dim=1))})
