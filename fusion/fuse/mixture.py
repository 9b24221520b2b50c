"""Mixture of distributions, as the abstract of MoD states it (Dang and Ngo 2024, arXiv:2411.00406)."""

from collections.abc import Sequence

from torch import Tensor

from fusion.fuse._x import common_kind, mix, shares, static
from fusion.losses._rows import Rows

TARGETS = ("sampled", "truncated", "whole")


def mixture(
    rows: Sequence[Rows],  # M teachers at N positions
    nats_per_byte: Tensor,  # (M, N), not used
    nats_per_token: Tensor,  # (M, N), not used
    *,
    weights: Sequence[float] | None = None,
) -> Rows:
    """sum_m w_m p_m, with the weights (1 each by default) made to add up to 1 over the teachers with a target there."""
    kind = common_kind("mixture", rows, TARGETS)
    return mix(rows, shares(static("mixture", rows, weights), rows), kind)
