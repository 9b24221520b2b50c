"""Unbalanced transport: a unit may leave mass behind, at a price (Chapel et al. 2021, arXiv:2106.04145)."""

import torch
from torch import Tensor

from alignment.match._plan import cost_of, uniform


def unbalanced(
    similarity: Tensor,  # (n, m), larger is better
    *,
    penalty: float = 0.2,
    least: float = 0.1,
    iterations: int = 5000,
) -> Tensor:
    """(n, m) float64 coupling of at most mass 1, in which poorly matched units lose mass; nothing is smoothed.

    `penalty` weighs the Kullback-Leibler divergence of the sums from uniform ones against costs in [0, 1]: a pair of
    cost c keeps about exp(-c / (2 penalty)) of its mass. A unit that keeps less than `least` of its own counts as
    unmatched, its row or column is zero. Raises ValueError where a similarity is not finite and where penalty is not
    positive.
    """
    import ot

    if not penalty > 0:
        raise ValueError(f"unbalanced: penalty must be above 0; given: {penalty}")
    n, m = similarity.shape
    plan = torch.from_numpy(
        ot.unbalanced.mm_unbalanced(
            uniform(n), uniform(m), cost_of(similarity), penalty, div="kl", numItermax=iterations, stopThr=1e-12
        )
    )
    plan = torch.where(plan > 1e-6 * plan.max(), plan, 0)
    plan = plan * (plan.sum(1, keepdim=True) * n >= least)
    return plan * (plan.sum(0, keepdim=True) * m >= least)
