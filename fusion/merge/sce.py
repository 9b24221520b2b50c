"""SCE: select by variance, calculate weights, erase minority signs (FuseChat: Wan et al. 2024, arXiv:2408.07990)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._x import Outputs, Reading, Sum

NEUTRAL = {"select_topk": 1.0}
SMALLEST = 1e-45  # the least float32 above 0


def upper(tensors: Tensor, base: Tensor, *, select_topk: float) -> dict[str, Reading]:
    counted = {"numel": Sum(torch.tensor(len(base)))}
    if select_topk >= 1:
        return {**counted, "squares": Sum(_x.squares(tensors, base))}
    variance = _variance(_x.deltas(tensors, base))
    return {**counted, "high": Sum(_x.high_counts(variance)), "varied": Sum(torch.count_nonzero(variance))}


def lower(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor]) -> dict[str, Reading]:
    return {"low": Sum(_x.low_counts(_variance(_x.deltas(tensors, base)), stats["bucket"]))}


def squares(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor]) -> dict[str, Reading]:
    d = _x.deltas(tensors, base)
    return {"squares": Sum(_x.squares(d.mul_(_selected(d, stats["least"]))))}


statistics = (upper, lower, squares)


def passes(*, select_topk: float) -> int:
    return 1 if select_topk >= 1 else 3


def settle(stats: Mapping[str, Tensor], *, select_topk: float, variant: str) -> dict[str, Tensor]:
    """Buckets after the first pass, the least variance selected after the second, weights (K,) at last."""
    share = _x.numbers(select_topk, 1, "select_topk", 0, 1)
    if "squares" in stats:
        mean = stats["squares"] / stats["numel"]
        whole = float(mean.sum())
        equal = whole == 0 or (variant == "mergekit" and whole < 1e-6)
        return {**stats, "shares": torch.full_like(mean, 1 / len(mean)) if equal else mean / whole}
    k = torch.tensor([_x.keep_counts(share, [int(stats["varied"])])])
    if "low" in stats:
        least = _x.threshold(stats["high"], stats["low"], k)
        return {"numel": stats["numel"], "least": least.clamp(min=SMALLEST)}
    return {**stats, "bucket": _x.bucket(stats["high"].unsqueeze(1), k)[0]}


def sce(
    tensors: Tensor,  # (K, n)
    base: Tensor,
    *,
    stats: Mapping[str, Tensor],
    select_topk: float = 1.0,
    variant: Literal["fusechat", "mergekit"] = "fusechat",
) -> Outputs:
    """(n,) base + sum w_t d_t / sum w_t over the models whose sign is that of sum d_t, + where that is 0.

    w_t is the share of model t in the sum of d_t^2 over the entries selected: the largest variances over models, a
    share `select_topk` of those above 0 and all that tie with the last (1: every entry); equal where all are 0. In
    `variant: fusechat`, the code that made FuseChat-7B, the selection serves the weights only; in `mergekit` what is
    not selected stays at the base, and the w_t are equal where the mean squares sum to less than 1e-6.
    Raises ValueError for a select_topk outside 0..1.
    """
    selected = _selected(_x.deltas(tensors, base), stats["least"]) if "least" in stats else None
    tau, _ = _x.agreed(tensors, stats["shares"], "unweighted", "weight", origin=base, even=1.0)
    if selected is not None and variant == "mergekit":
        tau.mul_(selected)
    kept = torch.tensor(len(base)) if selected is None else torch.count_nonzero(selected)
    return Outputs(tau.add_(base), {"kept": Sum(kept.repeat(len(tensors)))})


def _variance(d: Tensor) -> Tensor:  # (K, n)
    """(1, n) population variance over the models."""
    mean = _added(d).div_(len(d))
    variance, away = torch.zeros_like(mean), torch.empty_like(mean)
    for one in d:
        torch.sub(one, mean, out=away)
        variance.addcmul_(away, away)
    return variance.div_(len(d)).unsqueeze(0)


def _added(d: Tensor) -> Tensor:  # (K, n)
    """(n,) sum over the models, in their order."""
    out = d[0].clone()
    for one in d[1:]:
        out += one
    return out


def _selected(d: Tensor, least: Tensor) -> Tensor:
    """(n,) float32, 1 for an entry that is selected and 0 for others."""
    return _variance(d).ge_(least)[0]
