"""PCB: parameters compete within and across tasks, the winners are merged (Du et al. 2024, arXiv:2410.02396)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._x import Max, Outputs, Reading, Sum

SCOPE = "model"


def balances_upper(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor], form: str) -> dict[str, Reading]:
    balance = _balance(_x.deltas(tensors, base), stats["ends"], form)
    return {"high": Sum(_x.high_counts(balance)), "most": Max(balance.amax(1))}


def balances_lower(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor], form: str) -> dict[str, Reading]:
    balance = _balance(_x.deltas(tensors, base), stats["ends"], form)
    return {"low": Sum(_x.low_counts(balance, stats["bucket"]))}


statistics = (_x.upper, _x.lower, balances_upper, balances_lower)


def settle(stats: Mapping[str, Tensor], *, density: float, clip: float) -> dict[str, Tensor]:
    """First "ends" (K, 2): the smallest and largest |d| that clipping leaves; then the "least" (K, 1) balance kept."""
    share, cut = _x.numbers(density, 1, "density", 0, 1), _x.numbers(clip, 1, "clip", 0, 0.5)[0]
    high = stats["high"]
    n = int(high[0].sum())
    beyond = min(int(cut * n), (n - 1) // 2)
    ranks = [n - beyond, beyond + 1] if "most" not in stats else _x.keep_counts(share, [n])
    k = torch.tensor([ranks]).repeat(len(high), 1)
    if "low" not in stats:
        return {**stats, "bucket": _x.bucket(high.unsqueeze(1).expand(-1, len(ranks), -1), k)[0]}
    found = _x.threshold(high, stats["low"], k)
    if "most" not in stats:
        return {"ends": found}
    most = stats["most"].unsqueeze(1)
    least = torch.where(most > found, found, torch.nextafter(found, torch.zeros_like(found)))  # of equals all count 1
    return {"ends": stats["ends"], "least": least, "width": (most - least).masked_fill(most <= least, 1.0)}


def pcb(
    tensors: Tensor,  # (K, n)
    base: Tensor,
    weights: Tensor,
    *,
    stats: Mapping[str, Tensor],
    density: float = 0.1,
    form: Literal["nlp", "vision"] = "nlp",
    clip: float = 0.01,
    scale: float = 1.2,
) -> Outputs:
    """(n,) base + scale sum w_t s_t d_t / sum s_t, the base where no s_t is above 0; quantiles are of the whole model.

    z_t is |d_t| clipped to its quantiles `clip` and 1 - clip, then scaled to 0..1. The balance is exp(K z_t^2) times
    tanh(d_t sum_j d_j) (`form: nlp`) or sum_j tanh(z_t z_j) with the signs of d (`form: vision`, published with density
    0.05). s_t goes from 0 at model t's density-th largest balance to 1 at its largest; balances below 0 never count.
    Order statistics are exact. Raises ValueError for a density outside 0..1 and a clip outside 0..0.5.
    """
    d = _x.deltas(tensors, base)
    shares = _balance(d, stats["ends"], form).sub_(stats["least"]).div_(stats["width"]).clamp_(min=0)
    top, bottom = torch.zeros_like(base), torch.zeros_like(base)
    for weight, share, one in zip(weights.tolist(), shares, d, strict=True):
        top.add_(share * one, alpha=weight)
        bottom += share
    tau = top.div_(bottom.masked_fill_(bottom == 0, 1.0))
    return Outputs(_x.scaled(base, tau, scale), {"kept": Sum(_x.nonzeros(shares))})


def _balance(d: Tensor, ends: Tensor, form: str) -> Tensor:  # (K, n), (K, 2)
    """(K, n) exp(K z^2) times the agreement with the other models, divided by exp(K); 0 instead of less."""
    floor, ceiling = ends[:, :1], ends[:, 1:]
    width = ceiling - floor
    z = d.abs().clamp_(floor, ceiling).sub_(floor).div_(width.masked_fill(width == 0, 1.0))
    if form == "nlp":
        agreement = torch.tanh(d * sum(d[1:], d[0]))
    else:
        signed = z * d.sign()
        agreement = torch.zeros_like(d)
        for other in signed:
            agreement += torch.tanh(signed * other)
    return z.square_().sub_(1).mul_(len(d)).exp_().mul_(agreement).clamp_(min=0)
