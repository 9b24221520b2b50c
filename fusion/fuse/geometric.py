"""Log-linear pool: the normalised weighted geometric mean of the teachers (Hinton 2002, product of experts;
Genest and Zidek 1986, Combining probability distributions)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.fuse._x import Union, common_kind, shares, static
from fusion.losses._rows import INF, Rows

TARGETS = ("truncated", "whole")


def geometric(
    rows: Sequence[Rows],  # M teachers at N positions
    nats_per_byte: Tensor,  # (M, N), not used
    nats_per_token: Tensor,  # (M, N), not used
    *,
    weights: Sequence[float] | None = None,
) -> Rows:
    """prod_m p_m^w_m / Z, with the weights (1 each by default) made to add up to 1 over the teachers with a target.

    Truncated rows are pooled on the buckets that all of them list and everything else as one bucket, the tail; whole
    rows exactly. Where the teachers have no bucket in common that any could mean, there is no target.
    """
    kind = common_kind("geometric", rows, TARGETS)
    share = shares(static("geometric", rows, weights), rows)
    if len(rows) == 1:
        return rows[0]
    union = Union(rows, share)
    active = share > 0
    # a bucket that a complete teacher leaves out has probability 0 there, hence in the product
    listings = union.total(union.live.long()).gather(1, union.run)
    keep = union.live & (listings == active.sum(0).unsqueeze(1))
    weighed = union.log_probs * share.T.gather(1, union.teacher)
    pooled = union.total(weighed.masked_fill(~keep, 0.0))
    kept_run = union.total(keep.long()) > 0
    pooled = pooled.masked_fill(~kept_run, -INF)
    # what each teacher has outside the kept buckets, added up from the parts: a difference would cancel
    outside = union.log_probs.exp().masked_fill(union.known, 0.0)
    tails = torch.stack([r.tail for r in rows]).double().exp()
    tails = tails.T.contiguous().scatter_add(1, union.teacher, outside).T
    log_tail = torch.where(active, share * tails.log(), 0.0).sum(0).masked_fill(~active.any(0), -INF)
    norm = torch.logaddexp(pooled.logsumexp(1), log_tail)
    present = norm > -INF
    norm = norm.masked_fill(~present, 0.0)
    mass = (pooled - norm.unsqueeze(1)).exp()
    return union.rows(mass, keep, (log_tail - norm).exp(), kind, present)
