"""DELLA: a row's larger entries are kept with a higher probability (Deep et al. 2024, arXiv:2406.11617)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._draw import Draw
from fusion.merge._sums import row_length
from fusion.merge._x import Outputs, Reading, Sum

UNIT = "row"
SYMMETRIC = False  # each model has its own random numbers
NEUTRAL = {"density": 1.0, "epsilon": 0.0, "scale": 1.0}
Share = float | Sequence[float]


def passes(*, rescale: str) -> int:
    """Only `rescale: l1` needs statistics."""
    return int(rescale == "l1")


def statistics(
    tensors: Tensor, base: Tensor, *, draw: Draw, shape: tuple[int, ...], density: Share, epsilon: Share
) -> dict[str, Reading]:
    """(K, 2) sums of |d|, of all entries and of those that stay."""
    d = _x.deltas(tensors, base).abs_()
    rows = d.shape[1] // row_length(shape)
    sums = [_x.row_total(d, rows), _x.row_total(_pruned(d, draw, shape, density, epsilon, False), rows)]
    return {"sums": Sum(torch.stack([_x.tree(one.T) for one in sums], 1))}


def della(
    tensors: Tensor,  # (K, rows * length)
    base: Tensor,  # (rows * length,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    draw: Draw,
    shape: tuple[int, ...],
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.05,
    rescale: Literal["inverse", "l1", "none"] = "inverse",
    consensus: Literal["none", "ties"] = "none",
    scale: float = 1.0,
) -> Outputs:
    """(rows * length,) base + scale * sum w d~: entry j of a row stays with p_j = density - epsilon + 2 epsilon r_j.

    r_j in [0, 1] is the place of |d_j| in its row, 0 the smallest, earlier entries first among equals; 1/2 in a row of
    one. A tensor of one axis is one row. rescale inverse divides each entry by its p_j, as the paper does; l1 gives
    every tensor the sum of magnitudes of d; none leaves the entries. consensus ties sums over the entries with the
    elected sign only. Sums are not divided.
    Raises ValueError unless density - epsilon > 0 and density + epsilon <= 1.
    """
    d = _pruned(_x.deltas(tensors, base), draw, shape, density, epsilon, rescale == "inverse")
    kept = _x.nonzeros(d)
    factors = _x.rescaling("l1" if rescale == "l1" else "none", torch.ones(len(d)), stats)
    return Outputs(_x.scaled(base, _x.summed(d, weights.cpu() * factors, consensus), scale), {"kept": Sum(kept)})


def _pruned(
    d: Tensor, draw: Draw, shape: tuple[int, ...], density: Share, epsilon: Share, inverse: bool
) -> Tensor:  # (K, n), which it overwrites
    length = row_length(shape)
    densities, epsilons = _x.numbers(density, len(d), "density", 0, 1), _x.numbers(epsilon, len(d), "epsilon", 0, 1)
    for model, (row, p, e) in enumerate(zip(d, densities, epsilons, strict=True)):
        if p - e <= 0 or p + e > 1:
            raise ValueError(
                f"della keeps entries with probabilities from density - epsilon = {p - e:g} to density + epsilon = "
                f"{p + e:g}; they have to be above 0 and at most 1"
            )
        if p < 1:
            chance = _x.ranks(row.view(-1, length)).flatten().float()
            chance = chance.mul_(2 * e / (length - 1)).add_(p - e) if length > 1 else chance.fill_(p)
            row.mul_(draw.keep(model, chance))
            if inverse:
                row.div_(chance)
    return d
