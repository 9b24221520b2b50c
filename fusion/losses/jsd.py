"""Generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649)."""

import math

import torch
from torch import Tensor

from fusion.losses._rows import Rows
from fusion.losses._x import buckets, kl, refuse_sampled

TARGETS = ("truncated", "whole")


def jsd(log_q: Tensor, rows: Rows, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:  # (n, B)
    """(n,) beta KL(P || M) + (1 - beta) KL(Q || M) in nats, M = beta P + (1 - beta) Q; P teacher, Q student.

    Times temperature squared. At the ends, where that is zero, it is its own limit once divided by beta, or by
    1 - beta: KL(P || Q) at beta = 0 and KL(Q || P) at beta = 1.
    `log_q` holds the student's log-probabilities of all buckets, at `temperature` already.
    Raises ValueError for sampled rows, a beta outside [0, 1], or a temperature that the targets do not allow.
    """
    refuse_sampled("jsd", rows)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"jsd: beta is {beta}; it must lie between 0 (forward_kl) and 1 (reverse_kl)")
    log_p, log_q = buckets(log_q, rows, temperature)
    if beta == 0.0:
        divergence = kl(log_p, log_q)
    elif beta == 1.0:
        divergence = kl(log_q, log_p)
    else:
        log_m = mixed(log_p, log_q, beta)
        divergence = beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)
    return divergence * temperature**2


def mixed(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta P + (1 - beta) Q), -inf with zero gradient where both are zero."""
    none = torch.maximum(log_p, log_q) == -math.inf
    # logaddexp of two -inf has no gradient that is a number, and of one the gradient is right
    log_p, log_q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 0.0)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta)).masked_fill(none, -math.inf)
