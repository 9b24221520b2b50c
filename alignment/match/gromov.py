"""Gromov-Wasserstein: units matched by their relations to the others of their own network (Mémoli 2011)."""

import torch
from torch import Tensor

from alignment.match._plan import hold, profiles, relations, uniform


def gromov(similarity: Tensor, *, target: Tensor, donor: Tensor, iterations: int = 1000) -> Tensor:
    """(n, m) float64 coupling under which relations `target` (n, n) and `donor` (m, m) agree best.

    Nothing in common is needed, no shared sample and no matched space: of `similarity` (n, m) only the shape counts.
    It starts from the units' profiles of relations and ends in a local optimum (conditional gradient, as in Peyré et
    al. 2016 without entropy); O(n^3) a step, for up to some thousand units. Raises ValueError where a relation is not
    finite.
    """
    import ot

    one, other = relations(target, donor)
    n, m = similarity.shape
    a, b = uniform(n), uniform(m)
    start = ot.emd(a, b, profiles(one, other), numItermax=10_000_000)
    plan = ot.gromov.gromov_wasserstein(
        one, other, a, b, "square_loss", symmetric=True, G0=start, max_iter=iterations, tol_rel=1e-12, tol_abs=1e-12
    )
    return hold(torch.from_numpy(plan), 1e-6, "gromov", "its solver left the set of couplings")
