"""Folding sparse distributions onto buckets."""

from __future__ import annotations

import torch
from torch import Tensor


def project_rows(buckets: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Entries with equal buckets added, row by row, the heaviest first: (N, K) int64 with -1 as padding, (N, K) with
    -inf there.

    Entries with bucket -1 are dropped. Buckets of equal mass come in ascending order, so that the result never depends
    on the input's.
    """
    rows, width = buckets.shape
    if not rows or not width:
        return buckets, log_probs
    order = buckets.argsort(dim=1, stable=True)
    sorted_buckets = buckets.gather(1, order)
    # the padding takes no part: exp(-inf) adds nothing
    values = log_probs.gather(1, order).masked_fill(sorted_buckets < 0, -torch.inf)
    first = torch.ones_like(sorted_buckets, dtype=torch.bool)
    first[:, 1:] = sorted_buckets[:, 1:] != sorted_buckets[:, :-1]
    segment = first.cumsum(dim=1) - 1  # (N, K): which distinct bucket of its row an entry belongs to
    top = torch.full_like(values, -torch.inf).scatter_reduce(1, segment, values, "amax")
    shift = top.masked_fill(top == -torch.inf, 0.0)
    # an entry alone in its bucket comes through exactly: exp(0) = 1
    sums = torch.zeros_like(values).scatter_add(1, segment, (values - shift.gather(1, segment)).exp())
    masses = sums.log() + shift
    names = torch.full_like(buckets, -1).scatter(1, segment, sorted_buckets)
    names = names.masked_fill(masses == -torch.inf, -1)
    masses = masses.masked_fill(names < 0, -torch.inf)
    heaviest = masses.argsort(dim=1, descending=True, stable=True)
    return names.gather(1, heaviest), masses.gather(1, heaviest)
