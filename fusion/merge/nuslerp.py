"""NuSLERP: SLERP by the models' weights, of the models or of their task vectors (mergekit's method of that name)."""

from collections.abc import Mapping

from torch import Tensor

from fusion.merge import _gram
from fusion.merge._x import Reading

MODELS = (2, 2)


def statistics(tensors: Tensor, base: Tensor | None = None) -> dict[str, Reading]:
    return _gram.frame_gram(tensors, base)


def settle(stats: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    return {"point": _gram.slerp_point(stats["gram"], float(_gram.shares(weights, "nuslerp")[1]))}


def nuslerp(tensors: Tensor, weights: Tensor, base: Tensor | None = None, *, stats: Mapping[str, Tensor]) -> Tensor:
    """(n,) SLERP of two models (2, n) at t = w_2 / (w_1 + w_2); given a base, base + SLERP of both task vectors.

    True to the arc at any angle; the straight line where a vector is zero or both are parallel or opposite. Weights of
    different signs give a t outside [0, 1]. Raises ValueError when the weights add up to 0.
    """
    return _gram.combine(tensors, base, stats["point"])
