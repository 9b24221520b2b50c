"""TIES: trim, elect a sign, average those that agree (Yadav et al. 2023, arXiv:2306.01708)."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._x import Max, Outputs, Reading, Sum

NEUTRAL = {"density": 1.0, "scale": 1.0}
FEW = 1 << 14  # entries of a tensor that are sorted sooner than counted


def upper(
    tensors: Tensor, base: Tensor, *, shape: tuple[int, ...], density: float | Sequence[float], scope: str, count: str
) -> dict[str, Reading]:
    k, n = tensors.shape
    if scope == "tensor" and n == math.prod(shape) <= FEW:
        kept = _x.keep_counts(_x.numbers(density, k, "density", 0, 1), [n] * k, count)
        return {"threshold": Max(_x.largest(_x.deltas(tensors, base), kept))}
    return {"high": Sum(_x.high_counts(tensors, base))}


def lower(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor]) -> dict[str, Reading]:
    if "threshold" in stats:
        return {}
    return {"low": Sum(_x.low_counts(tensors, stats["bucket"], base))}


statistics = (upper, lower)


def passes(*, density: float | Sequence[float]) -> int:
    """Where everything stays there is no threshold to find."""
    return 0 if _x.everything(density) else 2


def settle(stats: Mapping[str, Tensor], *, density: float | Sequence[float], count: str) -> dict[str, Tensor]:
    """After the first pass the bins that hold the k-th largest magnitudes, after the second these magnitudes."""
    if "threshold" in stats:
        return {"threshold": stats["threshold"]}
    high = stats["high"]
    n = high.sum(-1).tolist()
    kept = _x.keep_counts(_x.numbers(density, len(n), "density", 0, 1), n, count)
    k = torch.tensor(kept).unsqueeze(1)
    if "low" not in stats:
        return {"high": high, "bucket": _x.bucket(high.unsqueeze(1), k)[0]}
    return {"threshold": _x.threshold(high, stats["low"], k).squeeze(1)}


def ties(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    normalize: bool | None = None,
    elect: Literal["weighted", "unweighted", "count"] = "weighted",
    scope: Literal["tensor", "model"] = "tensor",
    combine: Literal["mean", "sum"] = "mean",
    count: Literal["floor", "plus_one"] = "floor",
) -> Outputs:
    """(n,) base + scale * tau: tau is made, entry by entry, of the trimmed task vectors that have the elected sign.

    A task vector keeps its max(1, floor(density * n)) largest entries and all that tie with the last of them, n being
    the size of the tensor or (`scope: model`) of the whole model. combine mean: sum(w d) / sum(w), without `normalize`
    sum(w d) / count; combine sum: sum(w d). `normalize` left out is true for the mean. Where the weights of those that
    agree cancel, tau is 0.
    Raises ValueError for `combine: sum` with `normalize: true`, which contradict each other.
    """
    if combine == "sum" and normalize:
        raise ValueError("ties: combine is 'sum' and normalize is true: a sum is not divided; leave one of them out")
    divide = "" if combine == "sum" else "count" if normalize is False else "weight"
    least = stats["threshold"] if stats else None
    tau, kept = _x.agreed(tensors, weights, elect, divide, origin=base, least=least)
    return Outputs(_x.scaled(base, tau, scale), {"kept": Sum(kept)})
