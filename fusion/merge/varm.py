"""VaRM: models weighted by how far they moved each matrix, FuseChat's first version (Wan et al. 2024,
arXiv:2402.16107)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge._x import Reading, Sum, deltas, total

NEUTRAL: dict[str, float] = {}


def statistics(tensors: Tensor, base: Tensor) -> dict[str, Reading]:
    return {"squares": Sum(total(deltas(tensors, base).double().square_()))}


def settle(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    squares = stats["squares"]
    whole = squares.sum()
    return {"shares": torch.where(whole > 0, squares / whole.where(whole > 0, 1.0), 1 / len(squares))}


def varm(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor]) -> Tensor:  # (K, n), (n,)
    """(n,) sum w_t th_t with w_t = |d_t|^2 / sum |d_j|^2 of this tensor; equal weights where no model moved."""
    out = base.clone()
    for share, tensor in zip(stats["shares"].tolist(), tensors, strict=True):
        out.add_(tensor - base, alpha=share)
    return out
