"""Karcher mean: the point of the sphere with the least weighted squared arc length to all models (Karcher 1977)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge import _gram
from fusion.merge._x import Reading

NEUTRAL: dict[str, float] = {}


def statistics(tensors: Tensor, base: Tensor | None = None) -> dict[str, Reading]:
    return _gram.frame_gram(tensors, base)


def settle(stats: Mapping[str, Tensor], weights: Tensor, *, max_iter: int, tol: float) -> dict[str, Tensor]:
    if max_iter < 0:
        raise ValueError(f"karcher: max_iter counts steps, 0 or more, and is {max_iter}")
    if tol < 0:
        raise ValueError(f"karcher: tol is an angle, 0 or more, and is {tol:g}")
    gram, w = stats["gram"], _gram.shares(weights, "karcher")
    units, lengths = _gram.directions(gram)
    mean = _gram.mean_direction(gram, w, units)
    if mean is None:
        return {"point": w @ _gram.points(gram)}
    for _ in range(max_iter):
        pull = _pull(gram, mean, units, w * (lengths > 0))
        step = _gram.norm(gram, pull)
        if float(step) <= tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * pull
        mean = mean / _gram.norm(gram, mean)
    return {"point": mean * (w @ lengths)}


def karcher(
    tensors: Tensor,  # (K, n)
    weights: Tensor,
    base: Tensor | None = None,
    *,
    stats: Mapping[str, Tensor],
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Tensor:
    """(n,) the weighted mean direction on the sphere times the weighted mean length, weights divided by their sum.

    Of task vectors, added to the base, when there is one. Iterates u <- exp_u(sum w_t log_u(u_t)) from the normalised
    mean, in float64 on the Gram matrix, until the step is at most `tol` radians. A zero model counts in the mean length
    only; one opposite to the mean has no shortest arc to it and pulls nowhere. Where the directions cancel, the
    weighted mean. Raises ValueError when the weights add up to 0.
    """
    return _gram.combine(tensors, base, stats["point"])


def _pull(gram: Tensor, mean: Tensor, units: Tensor, w: Tensor) -> Tensor:
    """(K,) sum w_t log_mean(u_t), tangent at the mean; cos = 1 - |u_t - mean|^2 / 2 keeps small angles."""
    chord = units - mean
    theta = _gram.angle(gram, mean, units)
    sine = torch.sin(theta)
    # an angle of pi is known to the root of float64's precision: what is nearer to opposite than 1e-6 is opposite
    stretch = torch.where(sine > 1e-6, theta / sine.clamp(min=1e-6), (theta < 1.0).double())
    logs = chord + mean * (_gram.inner(gram, chord, chord) / 2).unsqueeze(1)
    return (w * stretch) @ logs
