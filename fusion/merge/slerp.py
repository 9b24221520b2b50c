"""SLERP: the great arc between two models (Shoemake 1985, "Animating rotation with quaternion curves")."""

from collections.abc import Mapping

from torch import Tensor

from fusion.merge import _gram
from fusion.merge._x import Reading

MODELS = (2, 2)
SYMMETRIC = False


def statistics(tensors: Tensor) -> dict[str, Reading]:
    return _gram.frame_gram(tensors, None)


def settle(stats: Mapping[str, Tensor], *, t: float, lerp_above: float) -> dict[str, Tensor]:
    return {"point": _gram.slerp_point(stats["gram"], t, lerp_above)}


def slerp(tensors: Tensor, *, stats: Mapping[str, Tensor], t: float, lerp_above: float = 1.0) -> Tensor:  # (2, n)
    """(n,) [sin((1 - t) A) a + sin(t A) b] / sin A with A the angle between the two tensors; t = 0 is the first model.

    Lengths are not normalised. The straight line (1 - t) a + t b where a tensor is zero, where both are parallel or
    opposite, and where |cos A| > `lerp_above`. A t outside [0, 1] goes on along the arc.
    """
    return _gram.combine(tensors, None, stats["point"])
