"""EMR: elect one unified task vector, mask and rescale it for each task (Huang et al. 2024, arXiv:2405.17461)."""

import torch
from torch import Tensor

from fusion.merge._x import Outputs, Reading, Sum, deltas, total

NEUTRAL: dict[str, float] = {}
EXTRAS = {"masks": "uint8"}


def emr(tensors: Tensor, base: Tensor) -> Outputs:  # (K, n), (n,)
    """(n,) base + tau: per entry the sign of sum d_t times the largest |d_t| among models of that sign, 0 if none.

    By-products that turn tau into model t again, base + rescaler_t (mask_t * tau): `masks` (K, n) uint8, 1 where d_t
    has tau's sign, and readings of (K,): rescaler_t is, over the whole model, `delta_l1` (sum |d_t|) divided by
    `masked_l1` (sum |mask_t * tau|).
    """
    d = deltas(tensors, base)
    sign = sum(d[1:], d[0]).sign()
    delta_l1 = Sum(total(d.abs()))
    agreeing = d.mul_(sign).clamp_(min=0)
    largest = agreeing.amax(0)
    masks = agreeing.sign_()
    masked_l1 = Sum(total(masks * largest))
    extras: dict[str, Tensor | Reading] = {"masks": masks.to(torch.uint8), "delta_l1": delta_l1, "masked_l1": masked_l1}
    return Outputs(largest.mul_(sign).add_(base), extras)
