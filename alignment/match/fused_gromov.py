"""Fused Gromov-Wasserstein: similarities across networks and relations within each (Vayer et al. 2019,
arXiv:1805.09114)."""

import torch
from torch import Tensor

from alignment.match._plan import cost_of, hold, profiles, relations, uniform


def fused_gromov(
    similarity: Tensor,  # (n, m), larger is better
    *,
    target: Tensor,  # (n, n)
    donor: Tensor,  # (m, m)
    alpha: float = 0.5,
    iterations: int = 1000,
) -> Tensor:
    """(n, m) float64 coupling of least (1 - alpha) costs across + alpha differences of relations within.

    Costs are similarities rescaled to [0, 1]. It starts from exact transport over costs and profiles of relations,
    weighed alike, and ends in a local optimum; O(n^3) a step. Raises ValueError where a number is not finite and for an
    alpha outside [0, 1].
    """
    import ot

    if not 0 <= alpha <= 1:
        raise ValueError(f"fused_gromov: alpha must be between 0 and 1; given: {alpha}")
    cost = cost_of(similarity)
    one, other = relations(target, donor)
    n, m = similarity.shape
    a, b = uniform(n), uniform(m)
    start = ot.emd(a, b, (1 - alpha) * cost + alpha * profiles(one, other), numItermax=10_000_000)
    plan = ot.gromov.fused_gromov_wasserstein(
        *(cost, one, other, a, b, "square_loss"),
        **{"symmetric": True, "alpha": alpha, "G0": start, "max_iter": iterations},
        **{"tol_rel": 1e-12, "tol_abs": 1e-12},
    )
    return hold(torch.from_numpy(plan), 1e-6, "fused_gromov", "its solver left the set of couplings")
