"""Exact optimal transport: the earth mover's distance (Kantorovich 1942; solved by POT, Flamary et al. 2021)."""

import torch
from torch import Tensor

from alignment.match._plan import cost_of, hold, uniform


def emd(similarity: Tensor, *, iterations: int = 10_000_000) -> Tensor:  # (n, m), larger is better
    """(n, m) float64 coupling of largest total similarity, every target unit of mass 1 / n, every donor unit 1 / m.

    Of as many units it is a permutation over n; of other numbers units are shared out, as in Singh and Jaggi 2020,
    arXiv:1910.05653. At most n + m - 1 entries are not zero. Raises ValueError where a similarity is not finite, and
    where `iterations` of the network simplex do not suffice.
    """
    import ot

    n, m = similarity.shape
    plan = ot.emd(uniform(n), uniform(m), cost_of(similarity), numItermax=iterations)
    return hold(torch.from_numpy(plan), 1e-6, "emd", "more iterations are needed")
