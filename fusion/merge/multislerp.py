"""Multi-SLERP: the normalised weighted mean direction of any number of models (mergekit's method of that name).

mergekit adds one step of the exponential map at that mean; its tangent, the sum of w_t (u_t - <u_t, m> m), is zero by
the definition of m, so the mean direction is all there is. Of two models it is SLERP's only at equal weights; `karcher`
is the mean on the sphere.
"""

from collections.abc import Mapping

from torch import Tensor

from fusion.merge import _gram
from fusion.merge._x import Reading

NEUTRAL: dict[str, float] = {}


def statistics(tensors: Tensor, base: Tensor | None = None) -> dict[str, Reading]:
    return _gram.frame_gram(tensors, base)


def settle(stats: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    gram, w = stats["gram"], _gram.shares(weights, "multislerp")
    units, lengths = _gram.directions(gram)
    mean = _gram.mean_direction(gram, w, units)
    return {"point": w @ _gram.points(gram) if mean is None else mean * (w @ lengths)}


def multislerp(tensors: Tensor, weights: Tensor, base: Tensor | None = None, *, stats: Mapping[str, Tensor]) -> Tensor:
    """(n,) m / |m| sum w_t |x_t| with m = sum w_t x_t / |x_t|, weights divided by their sum; x_t = d_t given a base.

    A zero x_t has no direction and counts in the mean length only. Where the directions cancel, the weighted mean.
    Raises ValueError when the weights add up to 0.
    """
    return _gram.combine(tensors, base, stats["point"])
