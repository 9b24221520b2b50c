"""DARE: task vectors of which a random part is dropped and the rest rescaled (Yu et al. 2023, arXiv:2311.03099)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._draw import Draw
from fusion.merge._x import Outputs, Reading, Sum

SYMMETRIC = False  # each model has its own random numbers
NEUTRAL = {"density": 1.0, "scale": 1.0}


def passes(*, rescale: str) -> int:
    """Only `rescale: l1` needs statistics."""
    return int(rescale == "l1")


def statistics(tensors: Tensor, base: Tensor, *, draw: Draw, density: float | Sequence[float]) -> dict[str, Reading]:
    """(K, 2) sums of |d|, of all entries and of those that stay."""
    d = _x.deltas(tensors, base).abs_()
    whole = _x.total(d)
    return {"sums": Sum(torch.stack([whole, _x.total(_dropped(d, draw, _densities(density, len(d))))], 1))}


def dare(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    draw: Draw,
    density: float | Sequence[float] = 0.5,
    rescale: Literal["inverse", "l1", "none"] = "inverse",
    consensus: Literal["none", "ties"] = "none",
    scale: float = 1.0,
) -> Outputs:
    """(n,) base + scale * sum w d~, where d~ has each entry of d with probability `density`, else 0.

    rescale inverse divides by the density, as the paper does; l1 gives every tensor of d~ the sum of magnitudes of d
    (nothing is rescaled where nothing stayed); none leaves the entries. consensus ties sums over the entries with the
    elected sign only. Sums are not divided. density 0 gives the base.
    """
    densities = _densities(density, len(tensors))
    d = _dropped(_x.deltas(tensors, base), draw, densities)
    kept = _x.nonzeros(d)
    factors = _x.rescaling(rescale, torch.tensor(densities), stats)
    tau = _x.summed(d, weights.cpu() * factors, consensus)
    return Outputs(_x.scaled(base, tau, scale), {"kept": Sum(kept)})


def _densities(density: float | Sequence[float], k: int) -> list[float]:
    return _x.numbers(density, k, "density", 0, 1)


def _dropped(d: Tensor, draw: Draw, densities: Sequence[float]) -> Tensor:  # (K, n), which it overwrites
    for model, (row, density) in enumerate(zip(d, densities, strict=True)):
        if density < 1:
            row.mul_(draw.keep(model, density))
    return d
