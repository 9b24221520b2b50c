"""MoD as its code has it: a hard choice between two models' MLP weights, not a mixture of distributions.

Dang and Ngo 2024 (arXiv:2411.00406) describe a mixture of the output distributions; the code they published selects
weights by where they lie between the smallest and the largest of the tensor. Mixing distributions is `fuse: mixture`.
"""

from collections.abc import Mapping

from torch import Tensor

from fusion.merge._x import Max, Min, Reading

MODELS = (2, 2)
SYMMETRIC = False


def statistics(tensors: Tensor, *, name: str) -> dict[str, Reading]:
    if "mlp" not in name:
        return {}
    return {"low": Min(tensors[0].min()), "high": Max(tensors[0].max())}


def mod_param(
    tensors: Tensor,  # (2, n)
    base: Tensor,
    *,
    stats: Mapping[str, Tensor],
    name: str,
    threshold: float = 0.9,
) -> Tensor:
    """(n,) the first model where (a - min a) / (max a - min a) < `threshold`, else the second; the base outside MLPs.

    An MLP's tensor is one with "mlp" in its name. A constant tensor counts as 0 everywhere.
    """
    if "mlp" not in name:
        return base.clone()
    a, b = tensors
    low, high = stats["low"].to(a), stats["high"].to(a)
    width = high - low
    place = (a - low) / width.where(width > 0, 1.0)
    return a.where(place < threshold, b)
