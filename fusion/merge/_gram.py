"""Directions from inner products: SLERP and Karcher means need no more of their inputs, whatever their size.

A point is a row of K coefficients in the frame (x_1, x_2 - x_1, ..., x_K - x_1), x_t being model t, or its task vector
when there is a base. Differences are taken before products: the Gram matrix of almost equal vectors has already lost
their distance to rounding, that of a frame keeps it, so angles far below 0.01 rad survive. The price: of a model much
shorter than the first is known what float32's rounding of the first leaves. Multi-SLERP of two models of 2,000 numbers,
one 1,000 times shorter, changes by 2.5e-5 with their order.
"""

import torch
from torch import Tensor

from fusion.merge._x import Reading, Sum, gram

TINY = 1e-8  # radians, and lengths of sums of unit vectors: below it a direction is rounding error


def frame(tensors: Tensor, base: Tensor | None) -> Tensor:  # (K, n), (n,)
    """(K, n): the first model (its task vector, given a base) and the others' differences to it."""
    out = torch.empty_like(tensors)
    torch.sub(tensors[1:], tensors[:1], out=out[1:])
    out[0] = tensors[0] if base is None else tensors[0] - base
    return out


def frame_gram(tensors: Tensor, base: Tensor | None) -> dict[str, Reading]:
    """The statistics of a method around directions: "gram" (K, K)."""
    return {"gram": Sum(gram(frame(tensors, base)))}


def points(gram: Tensor) -> Tensor:  # (K, K)
    """(K, K): row t is model t in the frame."""
    models = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    models[:, 0] = 1.0
    return models


def inner(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:  # (K, K), (..., K), (..., K)
    """(...) inner products of points."""
    return ((a @ gram) * b).sum(-1)


def norm(gram: Tensor, a: Tensor) -> Tensor:
    """(...) lengths of points."""
    return inner(gram, a, a).clamp(min=0).sqrt()


def angle(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(...) angles in radians between points, from the area they span with their difference; 0 for a zero point."""
    d = b - a
    aa, ad, dd = inner(gram, a, a), inner(gram, a, d), inner(gram, d, d)
    return torch.atan2((aa * dd - ad * ad).clamp(min=0).sqrt(), aa + ad)


def directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(K, K) unit points of the models, zero for a zero model, and their (K,) lengths."""
    models = points(gram)
    lengths = norm(gram, models)
    return models / lengths.where(lengths > 0, 1.0).unsqueeze(1) * (lengths > 0).unsqueeze(1), lengths


def mean_direction(gram: Tensor, w: Tensor, units: Tensor) -> Tensor | None:  # (K,), (K, K)
    """(K,) the weighted mean of the unit points, itself of length 1; None where they cancel."""
    mean = w @ units
    length = norm(gram, mean)
    return mean / length if float(length) > TINY else None


def slerp_point(gram: Tensor, t: float, lerp_above: float = 1.0) -> Tensor:
    """(2,) the point at share t of the arc from the first of two models to the second, lengths not normalised.

    The straight line instead where there is no shortest arc (a zero or opposite vector), where both are parallel, and
    where the cosine's magnitude exceeds `lerp_above`.
    """
    a, b = points(gram)
    theta = angle(gram, a, b)
    straight = theta < TINY or torch.pi - theta < TINY or float(torch.cos(theta).abs()) > lerp_above
    if straight or not bool(norm(gram, points(gram)).all()):
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def shares(weights: Tensor, word: str) -> Tensor:  # (K,)
    """(K,) float64 weights over their sum; ValueError when that is 0."""
    weights = weights.double()
    total = weights.sum()
    if float(total.abs()) < 1e-12:
        raise ValueError(f"{word} divides by the sum of the weights, and {weights.tolist()} add up to 0")
    return weights / total


def combine(tensors: Tensor, base: Tensor | None, point: Tensor) -> Tensor:  # (K, n), (n,), (K,)
    """(n,) float32: the point's combination of the frame, on top of the base if there is one."""
    first, *others = point.tolist()
    out = tensors[0] * first if base is None else (tensors[0] - base).mul_(first).add_(base)
    for coefficient, tensor in zip(others, tensors[1:], strict=True):
        out.add_(tensor - tensors[0], alpha=coefficient)
    return out
