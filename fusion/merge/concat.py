"""Concatenation: adapters side by side, whose update is exactly the weighted sum of theirs (as PEFT's `cat`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusion.merge._factors import best, stacked

UNIT = "adapter"


def concat(
    factors: Sequence[tuple[Tensor, Tensor]],  # K pairs A (r, in), B (out, r), the scale in B; ranks may differ
    weights: Tensor,  # (K,)
    *,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A (R, in), B (out, R) with B A = sum w B_k A_k and R the sum of ranks; of less rank, the closest to that sum.

    Weights may be negative and need not sum to 1. Raises ValueError for a rank below 1.
    """
    whole = stacked(factors, weights)
    return whole if rank is None or rank >= len(whole[0]) else best(whole, rank)
