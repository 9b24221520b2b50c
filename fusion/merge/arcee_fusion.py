"""Arcee Fusion: of one model the changes that stand out, the base everywhere else (mergekit's method of that name)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge import _x
from fusion.merge._sums import row_length
from fusion.merge._x import Outputs, Reading, Sum

UNIT = "row"
MODELS = (1, 1)


def upper(tensors: Tensor, base: Tensor, *, shape: tuple[int, ...]) -> dict[str, Reading]:
    return {"high": Sum(_x.high_counts(_importance(tensors[0], base, shape)))}


def lower(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Reading]:
    return {"low": Sum(_x.low_counts(_importance(tensors[0], base, shape), stats["bucket"]))}


statistics = (upper, lower)


def settle(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """After the first pass the bins of the quartiles, after the second Q1, median, Q3 (3,)."""
    high = stats["high"]
    n = int(high.sum())
    ranks = torch.tensor([[n - q * (n - 1) // 4 for q in (1, 2, 3)]])  # 1 is the largest
    if "low" in stats:
        return {"quartiles": _x.threshold(high, stats["low"], ranks)[0]}
    return {**stats, "bucket": _x.bucket(high.expand(1, 3, -1), ranks)[0]}


def arcee_fusion(
    tensors: Tensor,  # (1, n)
    base: Tensor,
    *,
    stats: Mapping[str, Tensor],
    shape: tuple[int, ...],
    fence: float = 1.5,
) -> Outputs:
    """(n,) the model where its importance is at least median + fence (Q3 - Q1) over the tensor, else the base.

    importance = |th - base| KL(softmax(row of th) || softmax(row of base)); a row is everything behind axis 0, a vector
    is one row. Quartile q of n entries is the floor(q (n - 1))-th from the smallest, exactly, over all of them.
    """
    low, middle, high = stats["quartiles"].tolist()
    important = _importance(tensors[0], base, shape) >= middle + fence * (high - low)
    return Outputs(tensors[0].where(important[0], base), {"kept": Sum(important.sum(1))})


def _importance(model: Tensor, base: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(1, n) float32."""
    length = row_length(shape)
    log_p = torch.log_softmax(model.double().view(-1, length), 1)
    log_q = torch.log_softmax(base.double().view(-1, length), 1)
    divergence = _x.row_total((log_p.exp() * (log_p - log_q)).flatten(), len(log_p)).clamp(min=0)
    return ((model - base).abs().view(-1, length) * divergence.float().unsqueeze(1)).view(1, -1)
