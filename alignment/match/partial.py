"""Partial transport: only the best matched share of the units (Chapel et al. 2020, arXiv:2002.08276)."""

import torch
from torch import Tensor

from alignment.match._plan import cost_of, uniform


def partial(similarity: Tensor, *, mass: float = 0.8, iterations: int = 10_000_000) -> Tensor:  # (n, m)
    """(n, m) float64 coupling of total `mass`, exact; rows and columns of units that are left over are zero.

    Raises ValueError where a similarity is not finite and for a mass outside (0, 1].
    """
    import ot

    if not 0 < mass <= 1:
        raise ValueError(f"partial: mass must be above 0 and at most 1; given: {mass}")
    n, m = similarity.shape
    cost = cost_of(similarity)
    if mass == 1:
        return torch.from_numpy(ot.emd(uniform(n), uniform(m), cost, numItermax=iterations))
    plan = torch.from_numpy(ot.partial.partial_wasserstein(uniform(n), uniform(m), cost, m=mass, numItermax=iterations))
    if abs(float(plan.sum()) - mass) > 1e-6:
        raise ValueError(f"partial: {float(plan.sum()):.6f} of the mass are matched and not {mass}: more iterations")
    return torch.where(plan > 1e-9 * plan.max(), plan, 0)
