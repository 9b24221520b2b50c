"""What the matchers by transport share: costs, marginals, and how good a coupling is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Quality:
    """Of a coupling (n, m): how far its sums are from uniform ones, relative to these; how many donor units share a
    target unit, exp(entropy) on average; the share of a target unit's mass on its best donor unit; its mass."""

    marginal_error: float
    effective_support: float
    largest_share: float
    mass: float


def cost_of(similarity: Tensor) -> np.ndarray:  # (n, m), larger is better
    """(n, m) float64 costs in [0, 1]; ValueError where a similarity is not finite."""
    similarity = similarity.detach().cpu().double()
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("a similarity of units is not finite: weights or statistics hold nan or infinity")
    spread = float(similarity.max() - similarity.min())
    cost: np.ndarray = ((similarity.max() - similarity) / (spread if spread > 0 else 1.0)).numpy()
    return cost


def uniform(n: int) -> np.ndarray:
    """(n,) equal masses that sum to one."""
    import numpy as np

    return np.full(n, 1 / n)


def quality(coupling: Tensor) -> Quality:
    """The numbers to judge a coupling by; units without mass are left out of the means."""
    n, m = coupling.shape
    rows, columns = coupling.sum(1), coupling.sum(0)
    error = max(float((rows * n - 1).abs().max()), float((columns * m - 1).abs().max()))
    share = coupling[rows > 0] / rows[rows > 0][:, None]
    support = torch.special.entr(share).sum(1).exp()
    live = len(share) > 0
    return Quality(
        error,
        float(support.mean()) if live else 0.0,
        float(share.amax(1).mean()) if live else 0.0,
        float(coupling.sum()),
    )


def hold(coupling: Tensor, tolerance: float, word: str, remedy: str) -> Tensor:
    """The coupling; ValueError where its sums are further from uniform ones than `tolerance` of these."""
    found = quality(coupling)
    if not found.marginal_error <= tolerance:
        raise ValueError(
            f"{word}: the sums of its coupling are up to {found.marginal_error:.2g} of a unit's mass away from what "
            f"they have to be, and {tolerance:g} is allowed: {remedy}"
        )
    return coupling


def relations(target: Tensor, donor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Similarities within each network (n, n) and (m, m), each over its root mean square."""
    made = []
    for one in (target, donor):
        one = one.detach().cpu().double()
        if not bool(torch.isfinite(one).all()):
            raise ValueError("a similarity of units is not finite: weights or statistics hold nan or infinity")
        size = float(one.square().mean().sqrt())
        made.append((one / (size if size > 0 else 1.0)).numpy())
    return made[0], made[1]


def profiles(target: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """(n, m) costs in [0, 1] of units whose relations to all others are spread differently: the third lower bound of
    the Gromov-Wasserstein distance (Mémoli 2011), a start that needs nothing in common."""
    import numpy as np

    at = (np.arange(min(len(target), len(donor))) + 0.5) / min(len(target), len(donor))
    one, other = (np.quantile(np.sort(table, 1), at, axis=1).T for table in (target, donor))
    gaps = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    gaps = np.maximum(gaps, 0)
    return gaps / max(float(gaps.max()), np.finfo(np.float64).tiny)
