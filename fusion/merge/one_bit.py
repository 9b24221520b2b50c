"""One bit an entry: every task vector as its signs times its mean magnitude (Liu et al. 2024, arXiv:2402.10193, whose
scale before distillation this is; 1bit-Merging: Liu et al. 2025, arXiv:2502.10743).

base + scale * sum_t w_t mean|d_t| sign(d_t), tensor by tensor, where sign(d) is +1 above 0 and -1 elsewhere: one bit
has no room for a 0. A tensor equal to the base's has mean|d_t| = 0 and stays.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge._x import Reading, Sum, deltas, scaled, total


def statistics(tensors: Tensor, base: Tensor) -> dict[str, Reading]:
    return {
        "magnitude": Sum(total(deltas(tensors, base).abs_())),
        "count": Sum(torch.tensor(len(base), dtype=torch.int64)),
    }


def one_bit(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """(n,) the base moved by the models' signs, each as far as its model moves on average."""
    lengths = (weights * magnitudes(stats)).tolist()
    moved = torch.zeros_like(base)
    for tensor, length in zip(tensors, lengths):
        moved += torch.where(tensor > base, length, -length)
    return scaled(base, moved, scale)


def magnitudes(stats: Mapping[str, Tensor]) -> Tensor:
    """(K,) float32 mean magnitude of each task vector."""
    return (stats["magnitude"] / stats["count"]).float()
