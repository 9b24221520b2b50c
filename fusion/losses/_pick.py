"""log-sum-exp of logits and a few of their entries, in one pass forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.losses._rows import INF


def pick(logits: Tensor, picks: Tensor, listed: Tensor, with_rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(picked (P,), rest (n,), total (n,)) in float32 from logits (n, V) of any dtype.

    `picks` (P,) and `listed` (L,) are flat positions, row * V + column. `picked` are those logits, `total` the rows'
    logsumexp, and `rest`, asked for by `with_rest`, the logsumexp of the columns not in `listed`, -inf for none: a sum
    of its own, since a difference would cancel. Autograd's own operations would keep five tensors of the logits' size.
    """
    picked, rest, total = Pick.apply(logits, picks, listed, with_rest)
    return picked, rest, total


class Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, picks, listed, with_rest):
        picked = logits.reshape(-1)[picks].float()
        top = logits.amax(1, keepdim=True).float()
        mass = (logits.float() - top).exp_()
        if with_rest:
            flat = mass.view(-1)
            rows = torch.div(listed, logits.shape[1], rounding_mode="floor")
            inside = torch.zeros_like(top[:, 0]).index_add_(0, rows, flat[listed])
            flat[listed] = 0.0
            outside = mass.sum(1)
            sums = inside + outside
            rest = outside.log() + top[:, 0]
        else:
            sums = mass.sum(1)
            outside, rest = sums, torch.full_like(sums, -INF)
        total = sums.log() + top[:, 0]
        ctx.save_for_backward(logits, picks, listed, total, rest)
        ctx.with_rest = with_rest
        return picked, rest, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_picked, grad_rest, grad_total):
        logits, picks, listed, total, rest = ctx.saved_tensors
        top = logits.amax(1).float()
        gradient = (logits.float() - top.unsqueeze(1)).exp_()
        of_total = grad_total * (top - total).exp()
        flat = gradient.view(-1)
        if ctx.with_rest:
            none = rest == -INF
            of_rest = grad_rest.masked_fill(none, 0.0) * (top - rest.masked_fill(none, 0.0)).exp().masked_fill(
                none, 0.0
            )
            inside = flat[listed] * of_total[torch.div(listed, logits.shape[1], rounding_mode="floor")]
            gradient *= (of_total + of_rest).unsqueeze(1)
            flat[listed] = inside
        else:
            gradient *= of_total.unsqueeze(1)
        flat.index_add_(0, picks, grad_picked.float())
        return gradient.to(logits.dtype), None, None, None
