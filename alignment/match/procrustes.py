"""The orthogonal matrix nearest to a correspondence (Schönemann 1966)."""

import torch
from torch import Tensor


def procrustes(similarity: Tensor, *, fixing_ones: bool = False) -> Tensor:  # (..., n, m) target rows times donor rows
    """(..., n, m) orthogonal Q of largest trace(Q^T similarity): the donor's units times Q are nearest the target's.

    For other widths its shorter rows or columns are orthonormal. `fixing_ones` restricts Q to those that take the
    direction of ones to that of ones, as a LayerNorm needs. Raises ValueError where a similarity is not finite.
    """
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("a similarity of units is not finite: weights or statistics hold nan or infinity")
    similarity = similarity.double()
    if fixing_ones:
        from alignment._groups import complement

        n, m = similarity.shape[-2:]
        rows, columns = complement(n), complement(m)
        inner = procrustes(rows.mT @ similarity @ columns)
        return torch.full((n, m), (n * m) ** -0.5, dtype=torch.float64) + rows @ inner @ columns.mT
    left, _, right = torch.linalg.svd(similarity, full_matrices=False)
    return left @ right
