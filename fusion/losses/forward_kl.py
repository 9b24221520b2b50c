"""Forward Kullback-Leibler divergence: KL(teacher || student) (Hinton et al. 2015, arXiv:1503.02531).

Truncated targets are compared on K + 1 buckets, the listed ones and everything else: by the data-processing inequality
a lower bound of the whole divergence, zero only where both agree on all buckets. Sampled targets give the cross-entropy
to the draws, whose gradient is an unbiased estimate (Anshumann et al. 2025, arXiv:2503.16870).
"""

from torch import Tensor

from fusion.losses._rows import INF, Rows
from fusion.losses._x import LOG_ZERO, buckets, check_temperature, kl, listed

TARGETS = ("sampled", "truncated", "whole")


def forward_kl(log_q: Tensor, rows: Rows, *, temperature: float = 1.0) -> Tensor:  # (n, B) log-probabilities of buckets
    """(n,) KL(teacher || student) in nats, times temperature squared; for sampled rows the cross-entropy to the draws.

    `log_q` is the student's distribution over all buckets, at `temperature` already. Draws on a token that has no
    bucket add nothing: the student is taught the distribution given the others.
    Raises ValueError when a temperature other than 1 meets targets that are not whole.
    """
    if rows.kind == "sampled":
        check_temperature(rows, temperature)
        log_p, log_q = rows.log_probs, listed(log_q, rows)
        none = (rows.ids < 0) | (log_p == -INF)
        log_q = log_q.masked_fill(log_q == -INF, LOG_ZERO).masked_fill(none, 0.0)
        return -(log_p.masked_fill(none, -INF).exp() * log_q).sum(1)
    return kl(*buckets(log_q, rows, temperature)) * temperature**2
