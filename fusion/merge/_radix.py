"""The exact k-th largest magnitude out of two passes of counting: by the upper 15 bits of |x|, then by the lower 16.

The bits of a non-negative float32 sort as the numbers do. Counts add up, so parts of a tensor may be counted in any
order, on any thread or rank, and the threshold is the same number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.merge._compiled import address, loops

HIGH, LOW = 1 << 15, 1 << 16
_GROUP = 256


def keep_count(density: float, n: int, count: str = "floor") -> int:
    """How many of n entries a density keeps: max(1, floor(density * n)), none for 0; `plus_one` one more."""
    return 0 if density == 0 else min(n, max(1, math.floor(density * n) + (count == "plus_one")))


def keep_counts(density: Sequence[float], n: Sequence[int], count: str = "floor") -> list[int]:
    """`keep_count` for each model."""
    return [keep_count(d, m, count) for d, m in zip(density, n, strict=True)]


def largest(x: Tensor, k: Sequence[int]) -> Tensor:  # (K, n) float32
    """(K,) the k-th largest |x| of each row, by sorting: for tensors so small that counting takes longer."""
    ordered = x.abs().sort(1, descending=True).values
    return torch.stack([row[m - 1] if m > 0 else row.new_full((), math.inf) for row, m in zip(ordered, k, strict=True)])


def high_counts(x: Tensor, origin: Tensor | None = None) -> Tensor:  # (K, n) float32, (n,)
    """(K, 32768) int64 how many entries have these upper 15 bits of |x|, or of |x - origin|."""
    if (compiled := loops(x)) is not None:
        x, out = x.contiguous(), torch.zeros(len(x), HIGH, dtype=torch.int64)
        compiled.count_upper(x.data_ptr(), *x.shape, address(origin), out.data_ptr())
        return out
    return torch.stack([torch.bincount(row, minlength=HIGH) for row in _magnitude_bits(x, origin) >> 16])


def low_counts(
    x: Tensor,  # (K, n) float32
    buckets: Tensor,  # (K, B) int64, upper bits asked about
    origin: Tensor | None = None,  # (n,)
) -> Tensor:
    """(K, B, 65536) int64 how many entries of each bucket have these lower 16 bits of |x|, or of |x - origin|."""
    out = torch.zeros(*buckets.shape, LOW, dtype=torch.int64, device=x.device)
    if (compiled := loops(x)) is not None:
        x, buckets = x.contiguous(), buckets.contiguous()
        asked = buckets.data_ptr(), buckets.shape[1]
        compiled.count_lower(x.data_ptr(), *x.shape, address(origin), *asked, out.data_ptr())
        return out
    for row, asked, counts in zip(_magnitude_bits(x, origin), buckets.tolist(), out, strict=True):
        for b, one in enumerate(asked):
            counts[b] = torch.bincount(row[row >> 16 == one] & (LOW - 1), minlength=LOW)
    return out


def ranks(x: Tensor) -> Tensor:  # (rows, n) float32
    """(rows, n) int32 place of each |x| in its row's ascending order, earlier entries first among equals."""
    out = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    if (compiled := loops(x)) is not None:
        x, scratch = x.contiguous(), torch.empty(3 * x.shape[1], dtype=torch.int32)
        compiled.ranks(x.data_ptr(), *x.shape, scratch.data_ptr(), out.data_ptr())
        return out
    order = x.abs().sort(dim=-1, stable=True).indices
    places = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return out.scatter_(-1, order, places.expand_as(out))


def nonzeros(x: Tensor) -> Tensor:  # (K, n) float32
    """(K,) int64 how many entries of each row are not zero."""
    if (compiled := loops(x)) is not None:  # torch's own count takes up to ten times as long
        x, out = x.contiguous(), torch.empty(len(x), dtype=torch.int64)
        compiled.count_nonzero(x.data_ptr(), *x.shape, out.data_ptr())
        return out
    return torch.count_nonzero(x, 1)


def _magnitude_bits(x: Tensor, origin: Tensor | None = None) -> Tensor:
    return (x if origin is None else x - origin).contiguous().view(torch.int32) & 0x7FFFFFFF


def bucket(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # (... or 1, BINS) integers, (...) int64
    """(...) the bin of the k-th largest, and which of that bin, from its largest, it is; (-1, 0) where k is 0."""
    k = k.to(counts.device)
    groups = counts.expand(*k.shape, -1).unflatten(-1, (-1, _GROUP))
    group, k = _from_top(groups.sum(-1), k)
    inside = groups.gather(-2, group.clamp(min=0)[..., None, None].expand(*group.shape, 1, _GROUP)).squeeze(-2)
    within, rest = _from_top(inside, k)
    return torch.where(group < 0, -1, group * _GROUP + within), rest


def _from_top(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    above = counts.flip(-1).cumsum(-1)
    index = torch.searchsorted(above, k.unsqueeze(-1)).clamp_(max=counts.shape[-1] - 1)
    before = torch.where(index > 0, above.gather(-1, (index - 1).clamp(min=0)), 0).squeeze(-1)
    none = k <= 0
    return torch.where(none, -1, counts.shape[-1] - 1 - index.squeeze(-1)), torch.where(none, 0, k - before)


def threshold(high: Tensor, low: Tensor, k: Tensor) -> Tensor:  # (K, HIGH), (K, B, LOW) int64, (K, B) int64
    """(K, B) float32 the k-th largest |x|, exact; inf where k is 0."""
    k = k.to(high.device)
    upper, rest = bucket(high.unsqueeze(1), k)
    lower, _ = bucket(low, rest)
    bits = (upper << 16 | lower).int().view(torch.float32)
    return torch.where(k > 0, bits, math.inf)
