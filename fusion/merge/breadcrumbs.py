"""Model Breadcrumbs: task vectors without their outliers and without their small entries (Davari, Belilovsky 2023,
arXiv:2312.06795)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._x import Outputs, Sum

NEUTRAL = {"density": 1.0, "gamma": 0.0, "scale": 1.0}


statistics = (_x.upper, _x.lower)


def passes(*, density: float | Sequence[float], gamma: float | Sequence[float]) -> int:
    """Where everything stays there is no border to find."""
    return 0 if _x.everything(density) and not any(gamma if isinstance(gamma, Sequence) else [gamma]) else 2


def settle(
    stats: Mapping[str, Tensor], *, density: float | Sequence[float], gamma: float | Sequence[float]
) -> dict[str, Tensor]:
    """After the first pass the bins of the largest and the least magnitude that stay, after the second (K, 2) both."""
    high = stats["high"]
    k, n = len(high), high.sum(1).tolist()
    kept = _x.keep_counts(_x.numbers(density, k, "density", 0, 1), n)
    top = [int(share * m) for share, m in zip(_x.numbers(gamma, k, "gamma", 0, 1), n, strict=True)]
    # counted from the largest, the first `top` go and the next `kept` stay
    places = torch.tensor(
        [[t + 1, min(t + c, m)] if c and t < m else [0, 0] for t, c, m in zip(top, kept, n, strict=True)]
    )
    if "low" not in stats:
        return {"high": high, "bucket": _x.bucket(high.unsqueeze(1), places)[0]}
    return {"border": _x.threshold(high, stats["low"], places)}


def breadcrumbs(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    consensus: Literal["none", "ties"] = "none",
    scale: float = 1.0,
) -> Outputs:
    """(n,) base + scale * sum w d over what stays of each task vector, with `consensus: ties` over agreeing signs only.

    The floor(gamma * n) largest entries of a tensor always go, also at density 1: outliers go whatever is kept. Of the
    rest the max(1, floor(density * n)) largest stay, or as many as there are, and all that tie with the first or the
    last of them. gamma 0 is magnitude pruning. Sums are not divided.
    """
    d = _x.deltas(tensors, base)
    for row, (most, least) in zip(d, stats["border"].tolist() if stats else ()):
        outliers = _x.trimmed(row, float(torch.tensor(most).nextafter(torch.tensor(torch.inf))))
        _x.trimmed(row, least, out=row).sub_(outliers)
    return Outputs(_x.scaled(base, _x.summed(d, weights, consensus), scale), {"kept": Sum(_x.nonzeros(d))})
