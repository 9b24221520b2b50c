"""What the divergences share: both distributions on the buckets a target lists, and the rest as one more bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.losses._rows import INF, Rows

# log of a probability that is zero, where the formula asks for it all the same (as in torch's binary_cross_entropy)
LOG_ZERO = -100.0


def refuse_sampled(name: str, rows: Rows) -> None:
    if rows.kind == "sampled":
        raise ValueError(
            f"{name} has no unbiased estimate from sampled targets (it needs the teacher's probability of what the "
            f"student says, drawn or not): record with top_k or nucleus instead of draws, or take loss: forward_kl"
        )


def listed(log_q: Tensor, rows: Rows) -> Tensor:  # (n, B)
    """(n, K) float32 log-probabilities that the student gives to the entries, -inf at padding."""
    return log_q.gather(1, rows.ids.clamp(min=0)).float().masked_fill(rows.ids < 0, -INF)


def rest(log_q: Tensor, rows: Rows) -> Tensor:  # (n, B)
    """(n,) float32 log mass that the student gives to everything the rows do not list, -inf for none.

    It is summed over the buckets that are not listed: log(1 - sum of the others) would lose it, and its gradient,
    to cancellation wherever the student is sure.
    """
    n, width = log_q.shape
    # one column more takes the padding's marks
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=log_q.device)
    marks.scatter_(1, rows.ids.masked_fill(rows.ids < 0, width), True)
    others = log_q.float().masked_fill(marks[:, :width], -INF)
    top = others.detach().amax(1, keepdim=True)
    none = top == -INF
    sums = (others - top.masked_fill(none, 0.0)).exp().sum(1)
    total = torch.where(none.squeeze(1), 1.0, sums).log() + top.squeeze(1)
    return total.masked_fill(none.squeeze(1), -INF)


def buckets(log_q: Tensor, rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:  # (n, B)
    """(log_p, log_q), both (n, K + 1): teacher and student on the entries and on everything else together."""
    log_p = rows.log_probs.masked_fill(rows.ids < 0, -INF)
    if temperature != 1.0:
        check_temperature(rows, temperature)
        log_p = torch.log_softmax(log_p / temperature, 1)
    log_p = torch.cat([log_p, rows.tail.unsqueeze(1)], 1)
    return log_p, torch.cat([listed(log_q, rows), rest(log_q, rows).unsqueeze(1)], 1)


def check_temperature(rows: Rows, temperature: float) -> None:
    """Raises ValueError unless the rows can be tempered: p^(1/T) needs every probability."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if temperature != 1.0 and (rows.kind != "whole" or bool((rows.tail > -INF).any())):
        raise ValueError(
            f"temperature {temperature} needs whole targets without a tail, these are {rows.kind}: a distribution "
            f"known in part cannot be sharpened or flattened; leave temperature at 1 or record every entry"
        )


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # (n, K) each
    """(n,) KL(a || b) in nats. Where a is zero nothing is added, in value or gradient; a zero of b counts as e^-100."""
    none = log_a == -INF
    log_a = log_a.masked_fill(none, 0.0)
    log_b = log_b.masked_fill(log_b == -INF, LOG_ZERO).masked_fill(none, 0.0)
    return (log_a.exp() * (log_a - log_b)).sum(1)
