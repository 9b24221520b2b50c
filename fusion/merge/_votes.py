"""Sums over models, entry by entry: of all, or of those that agree on a sign; one pass over memory where loops are
compiled, the same bits without. Products and sums are rounded to float32 one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion.merge._compiled import address, loops
from fusion.merge._radix import nonzeros


def weighted(tensors: Tensor, weights: Tensor, origin: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(n,) sum(w t) of (K, n) by (K,); given an origin (n,), origin + scale * sum(w (t - origin))."""
    weights = weights.float().cpu()
    if (compiled := loops(tensors)) is not None:
        tensors, weights, out = tensors.contiguous(), weights.contiguous(), torch.empty_like(tensors[0])
        compiled.weigh(tensors.data_ptr(), *tensors.shape, address(origin), weights.data_ptr(), scale, out.data_ptr())
        return out
    total, part = torch.zeros_like(tensors[0]), torch.empty_like(tensors[0])
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        torch.mul(tensor, weight, out=part) if origin is None else torch.sub(tensor, origin, out=part).mul_(weight)
        total.add_(part)
    return total if origin is None else total.mul_(scale).add_(origin)


def summed(deltas: Tensor, weights: Tensor, consensus: str) -> Tensor:  # (K, n), (K,)
    """(n,) sum(w d); with consensus "ties" over the entries whose w d has the sign of that sum."""
    return agreeing(deltas, weights) if consensus == "ties" else weighted(deltas, weights)


def trimmed(x: Tensor, least: float, out: Tensor | None = None) -> Tensor:  # (n,)
    """(n,) x with 0 for every |x| < least, which is a float32; `out` may be x."""
    # hardshrink keeps |x| > its argument: the float32 before `least`; masks would take ten times as long
    return torch.hardshrink(x, float(torch.tensor(least).nextafter(torch.tensor(-math.inf))), out=out)


def elect(deltas: Tensor, weights: Tensor, how: str = "weighted") -> Tensor:  # (K, n), (K,)
    """(n,) float32 elected sign: of sum(w d), of sum(d), or of the count of plus less the count of minus.

    Sums that cancel to exactly zero elect nobody (0). As many plus as minus elect plus, PEFT's rule; where no model
    has an entry, nobody.
    """
    if how == "count":
        ballots, voters = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for d in deltas:
            sign = d.sign()
            ballots.add_(sign)
            voters.add_(sign.abs_())
        return ballots.add_(0.5).sign_().mul_(voters.sign_())
    return weighted(deltas, weights if how == "weighted" else torch.ones(len(deltas))).sign_()


def agreeing(deltas: Tensor, weights: Tensor, how: str = "weighted", divide: str = "") -> Tensor:
    """The first of what `agreed` gives."""
    return agreed(deltas, weights, how, divide)[0]


def agreed(
    tensors: Tensor,  # (K, n)
    weights: Tensor,  # (K,)
    how: str = "weighted",
    divide: str = "",
    *,
    origin: Tensor | None = None,  # (n,)
    least: Tensor | None = None,  # (K,)
    even: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(n,) sum(w d) over the entries with the elected sign, divided by their sum(w) (`weight`) or number (`count`); and
    (K,) how many entries of each d are not zero.

    d is t - origin where that is at least `least` in magnitude, and 0 elsewhere. `even` is what is elected where the
    sum cancels. An entry's own sign is that of w d where the election weighs, of d where it does not. Nothing is
    divided by 0: where the weights of those that agree cancel, the result is 0.
    """
    weights = weights.float().cpu()
    if how != "count" and (compiled := loops(tensors)) is not None:
        tensors, out = tensors.contiguous(), torch.empty_like(tensors[0])
        votes = weights.contiguous() if how == "weighted" else torch.ones(len(tensors))
        shares = votes.abs() if how == "weighted" else weights.contiguous()
        divisors = {"weight": weights.contiguous(), "count": torch.ones(len(tensors))}.get(divide)
        least = None if least is None else least.float().contiguous()
        kept = torch.zeros(len(tensors), dtype=torch.int64)
        given = [address(one) for one in (origin, least, votes, divisors, shares)]
        compiled.agree(tensors.data_ptr(), *tensors.shape, *given, even, out.data_ptr(), kept.data_ptr())
        return out, kept
    deltas = tensors if origin is None else tensors - origin
    if least is not None:
        deltas = torch.stack([trimmed(d, one) for d, one in zip(deltas, least.tolist(), strict=True)])
    sign = elect(deltas, weights, how)
    if even:
        sign.masked_fill_(sign == 0, even)
    total, divisor, part = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for d, w in zip(deltas, weights.tolist(), strict=True):
        torch.mul(d, sign, out=part)  # above 0 where d has the elected sign
        if how == "weighted" and w < 0:
            part.neg_()
        elif how == "weighted" and w == 0:
            continue
        if divide:
            divisor.add_(part.sign().clamp_(min=0).mul_(w if divide == "weight" else 1.0))
        total.add_(part.clamp_(min=0).mul_(abs(w) if how == "weighted" else w))
    total.mul_(sign)
    if divide:
        total.div_(divisor).nan_to_num_(0.0, 0.0, 0.0)  # masks would take ten times as long
    return total, nonzeros(deltas)
