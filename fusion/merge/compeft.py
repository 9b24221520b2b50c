"""ComPEFT: task vectors of which only large entries' signs are left, and one magnitude (Yadav et al. 2023,
arXiv:2311.13171).

base + scale * sum_t w_t alpha std(d_t) sign(d_t) on the max(1, floor(density * n)) largest entries of d_t, and all that
tie with the last of them. n entries and their standard deviation are those of the tensor, or of the whole model with
`scope: model`, as in the paper, which chooses alpha on held-out data and 1 for large models.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._x import Outputs, Reading, Sum


def upper(tensors: Tensor, base: Tensor) -> dict[str, Reading]:
    d = _x.deltas(tensors, base)
    sums = {"sum": Sum(_x.total(d)), "square": Sum(_x.squares(d))}
    return {"high": Sum(_x.high_counts(d)), **sums}


statistics = (upper, _x.lower)


def settle(stats: Mapping[str, Tensor], *, density: float | Sequence[float]) -> dict[str, Tensor]:
    """After the second pass the smallest magnitude that is kept and the standard deviation, of every model."""
    high = stats["high"]
    n = high.sum(-1)
    k = torch.tensor(_x.keep_counts(_x.numbers(density, len(n), "density", 0, 1), n.tolist())).unsqueeze(1)
    if "low" not in stats:
        return {**stats, "bucket": _x.bucket(high.unsqueeze(1), k)[0]}
    variance = stats["square"] / n - (stats["sum"] / n).square()
    return {
        "threshold": _x.threshold(high, stats["low"], k).squeeze(1),
        "deviation": variance.clamp(min=0).sqrt().float(),
    }


def compeft(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    density: float | Sequence[float] = 0.2,
    alpha: float | Sequence[float] = 1.0,
    scale: float = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
) -> Outputs:
    """(n,) the base moved by the models' ternary task vectors. Raises ValueError when a density is outside [0, 1]."""
    lengths = (weights * stats["deviation"] * _x.per_model(alpha, len(tensors), "alpha", 0).to(tensors.device)).tolist()
    moved, kept = torch.zeros_like(base), []
    for d, least, length in zip(_x.deltas(tensors, base), stats["threshold"].tolist(), lengths):
        signs = ternary(d, least)
        kept.append(torch.count_nonzero(signs))
        moved.add_(signs, alpha=length)
    return Outputs(_x.scaled(base, moved, scale), {"kept": Sum(torch.stack(kept))})


def ternary(d: Tensor, least: float) -> Tensor:  # (n,)
    """(n,) float32 signs of the entries that are at least so large, 0 elsewhere."""
    return d.sign() * (d.abs() >= least)
