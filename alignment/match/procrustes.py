"""The orthogonal matrix nearest to a correspondence (Schönemann 1966)."""

import torch
from torch import Tensor


def procrustes(similarity: Tensor, *, fixing_ones: bool = False) -> Tensor:  # (..., n, n) target rows times donor rows
    """(..., n, n) orthogonal Q of largest trace(Q^T similarity): the donor's units times Q are nearest the target's.

    `fixing_ones` restricts Q to those that keep the mean of all units, the rotations that a LayerNorm allows. Raises
    ValueError where a similarity is not finite.
    """
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("a similarity of units is not finite: weights or statistics hold nan or infinity")
    similarity = similarity.double()
    if fixing_ones:
        from alignment._groups import complement

        n = similarity.shape[-1]
        rest = complement(n)
        inner = procrustes(rest.mT @ similarity @ rest)
        return torch.full((n, n), 1 / n, dtype=torch.float64) + rest @ inner @ rest.mT
    left, _, right = torch.linalg.svd(similarity)
    return left @ right
