"""RAM and RAM+: what only one agent changed is kept whole, what several changed is averaged (Yuan et al. 2026,
arXiv:2601.13572)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fusion.merge._x import Outputs, Reading, Sum, deltas

NEUTRAL = {"epsilon": 0.0}


def passes(*, r: float) -> int:
    return 0 if r == 0 else 1


def statistics(tensors: Tensor, base: Tensor, *, epsilon: float) -> dict[str, Reading]:
    changed = deltas(tensors, base).abs_() > epsilon
    alone = changed.sum(0) == 1
    return {"unique": Sum((changed & alone).sum(1)), "shared": Sum((changed & ~alone).sum(1))}


def ram(
    tensors: Tensor,  # (K, n)
    base: Tensor,
    *,
    stats: Mapping[str, Tensor],
    epsilon: float = 1e-5,
    r: float = 0.0,
    alpha: float = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
) -> Outputs:
    """(n,) base + sum over the models with |d_t| > epsilon of d_t / c, c how many those are.

    RAM+ (r > 0) multiplies what only model t changed by 1 + r clip(shared_t / unique_t, 0, alpha), the two counting the
    entries it changed with and without others, over this tensor or the whole model (`scope`).
    """
    d = deltas(tensors, base)
    changed = d.abs().gt_(epsilon)
    d.mul_(changed)
    count = changed.sum(0)
    out = sum(d[1:], d[0]).div_(count.clamp(min=1)).add_(base)
    if r != 0:
        overlap = stats["shared"].double() / stats["unique"].clamp(min=1)
        lift = torch.zeros_like(base)
        for one, more in zip(d, (r * overlap.clamp(0, alpha)).tolist(), strict=True):
            lift.add_(one, alpha=more)
        out += lift.mul_(count.eq_(1))
    return Outputs(out, {"kept": Sum(torch.count_nonzero(changed, dim=1))})
