"""Reverse Kullback-Leibler divergence: KL(student || teacher), which seeks modes (Gu et al. 2023, arXiv:2306.08543)."""

from torch import Tensor

from fusion.losses._rows import Rows
from fusion.losses._x import buckets, kl, refuse_sampled

TARGETS = ("truncated", "whole")


def reverse_kl(log_q: Tensor, rows: Rows, *, temperature: float = 1.0) -> Tensor:  # (n, B) log-probabilities of buckets
    """(n,) KL(student || teacher) in nats on the K listed buckets and the rest, times temperature squared.

    `log_q` is the student's distribution over all buckets, at `temperature` already. A teacher's zero counts as e^-100.
    Raises ValueError for sampled rows, and when a temperature other than 1 meets targets that are not whole.
    """
    refuse_sampled("reverse_kl", rows)
    log_p, log_q = buckets(log_q, rows, temperature)
    return kl(log_q, log_p) * temperature**2
