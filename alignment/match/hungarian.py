"""The permutation of largest total similarity (Kuhn 1955; solved by scipy after Crouse 2016)."""

import torch
from torch import Tensor


def hungarian(similarity: Tensor) -> Tensor:  # (n, m), larger is better
    """int64 (n,): the donor unit of each target unit, -1 for target units left over where there are fewer donor units.

    Exact. Units that are each other's best are paired first; that is optimal if the others, free to take any donor
    unit, want none of these, which is checked by an assignment of the others alone. Where they do, all are assigned
    together. Raises ValueError where a similarity is not finite.
    """
    similarity = similarity.detach().cpu()
    if not bool(torch.isfinite(similarity.sum(dtype=torch.float64))):
        raise ValueError("a similarity of units is not finite: weights or statistics hold nan or infinity")
    n, m = similarity.shape
    found = torch.full((n,), -1, dtype=torch.int64)
    best, wanted = similarity.argmax(1), similarity.argmax(0)
    mutual = wanted[best] == torch.arange(n)
    found[mutual] = best[mutual]
    rest = torch.nonzero(~mutual)[:, 0]
    if len(rest) < n <= m:
        rows, columns = _assign(similarity[rest])
        found[rest[rows]] = columns
    if len(rest) == n or n > m or len(found.unique()) < n:
        found[:] = -1
        rows, columns = _assign(similarity)
        found[rows] = columns
    return found


def _assign(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of scipy's assignment; it works in float64, and would copy a table that it is to maximise."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity.to(torch.float64, copy=True).neg_().numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)
