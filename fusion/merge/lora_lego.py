"""LoRA-LEGO: the rank-one units of all adapters clustered, one unit a cluster (Zhao et al. 2024, arXiv:2409.16167)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.merge._draw import Draw

UNIT = "adapter"


def lora_lego(
    factors: Sequence[tuple[Tensor, Tensor]],  # K pairs A (r, in), B (out, r), the scale in B; ranks may differ
    weights: Tensor,  # (K,)
    *,
    draw: Draw,
    rank: int | None = None,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """A (k, in), B (out, k) made of k clusters' centres; k is `rank`, at most the number of different units.

    A unit is [a_i; b_i], a row of A and its column of B; k-means starts from hashed k-means++ draws. Both rescalings
    of the paper follow: a centre gets the mean norm of its members back, and the update is multiplied by sqrt(r / k),
    r the mean rank of the inputs. Weights count inside a cluster: they are those of its mean. `rank` defaults to the
    largest rank. Raises ValueError for a rank below 1, negative weights, and when none is above 0.
    """
    w = torch.as_tensor(weights, dtype=torch.float64)
    if bool((w < 0).any()) or not bool((w > 0).any()):
        raise ValueError(f"lora_lego: weights are {w.tolist()}; a mean needs none below 0 and one above")
    ranks = [len(a) for a, _ in factors]
    k = max(ranks) if rank is None else rank
    if k < 1:
        raise ValueError(f"lora_lego: rank is {k}; it must be at least 1")
    units = torch.cat([torch.cat([a, b.T], 1) for a, b in factors]).double()  # (N, in + out)
    share = w.repeat_interleave(torch.tensor(ranks))  # (N,)
    order = units[share > 0].norm(dim=1).argsort(stable=True)  # whose adapter comes first must not matter
    units, share = units[share > 0][order], share[share > 0][order]
    owner = clusters(units, share, min(k, len(units)), draw, iterations)
    count = int(owner.max()) + 1
    member = torch.nn.functional.one_hot(owner, count).T * share  # (k, N)
    member = member / member.sum(1, keepdim=True)
    centres = member @ units
    norms = centres.norm(dim=1)
    wanted = member @ units.norm(dim=1)
    centres = centres * torch.where(norms > 0, wanted / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)[:, None]
    wide = factors[0][0].shape[1]
    spread = (sum(ranks) / len(ranks) / count) ** 0.5
    return centres[:, :wide].float().contiguous(), (centres[:, wide:].T * spread).float().contiguous()


def clusters(units: Tensor, share: Tensor, k: int, draw: Draw, iterations: int) -> Tensor:  # (N, d), (N,)
    """(N,) cluster of each unit, 0 to k - 1, none empty; fewer than k when fewer units differ."""
    chance = Draw(draw.seed, draw.name, 0, k, draw.step).uniform(0).double()
    centres = units[[_pick(share, chance[0])]]  # a copy: it will be moved
    for step in range(1, k):
        far = torch.cdist(units, centres).square().amin(1) * share
        if not bool((far > 0).any()):
            break
        centres = torch.cat([centres, units[_pick(far, chance[step])][None]])
    owner = torch.cdist(units, centres).argmin(1)
    for _ in range(iterations):
        for c in range(len(centres)):
            mine = owner == c
            if bool(mine.any()):  # a cluster that lost its members keeps its centre, and may win them back
                centres[c] = share[mine] @ units[mine] / share[mine].sum()
        moved = torch.cdist(units, centres).argmin(1)
        if torch.equal(moved, owner):
            break
        owner = moved
    return owner.unique(return_inverse=True)[1]


def _pick(mass: Tensor, chance: Tensor) -> int:
    """Index with probability proportional to its mass, never one without."""
    total = mass.cumsum(0)
    found = int(torch.searchsorted(total, chance * total[-1], right=True))
    return min(found, int(mass.nonzero()[-1]))
