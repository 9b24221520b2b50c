"""Low-rank updates as pairs of factors: (A, B) of shapes (r, in) and (out, r) stand for B A, (out, in)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.merge._linalg import axes, cross, inverse, tall, times

Factors = tuple[Tensor, Tensor]


def stacked(factors: Sequence[Factors], weights: Sequence[float] | Tensor) -> Factors:
    """Factors of sum w B A, of rank sum r: the sum itself, nothing dropped."""
    a = torch.cat([a for a, _ in factors])
    return a, torch.cat([float(weight) * b for (_, b), weight in zip(factors, weights)], 1)


def best(factors: Factors, rank: int) -> Factors:
    """The closest factors of that rank in Frobenius norm, both parts equally large; B A is never formed.

    With B = Q R and A^T = P S, the singular values of B A are those of the small R S^T.
    """
    _check(rank)
    a, b = (one.double() for one in factors)
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.T)
    u, sizes, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    root = sizes[:rank].sqrt()
    return (root.unsqueeze(1) * (v[:rank] @ p.T)).float().contiguous(), (q @ u[:, :rank] * root).float().contiguous()


def of_dense(update: Tensor, rank: int) -> Factors:  # (out, in)
    """The closest factors of that rank to a matrix: its projection on the first eigenvectors of its smaller Gram
    matrix, several times sooner there than a whole SVD."""
    _check(rank)
    x = tall(update)
    sizes, v = axes(cross(x, x), len(x))
    root, v = sizes[:rank].sqrt(), v[:, :rank]
    long, short = times(x, v * inverse(root)), (v * root).float()  # (m, rank), (n, rank)
    b, a = (long, short) if update.shape == x.shape else (short, long)
    return a.T.contiguous(), b.contiguous()


def _check(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
