"""LiNeS: changes grow linearly with depth, shallow layers stay near the base (Wang et al. 2024, arXiv:2410.17146)."""

from typing import Literal

from torch import Tensor

from fusion.merge._x import is_embedding


def lines(
    tensor: Tensor,  # (n,) merged
    base: Tensor,
    *,
    name: str,
    layer: tuple[int, int] | None,  # which layer of how many, from 0
    alpha: float,
    beta: float | None = None,
    outside: Literal["depth", "alpha"] = "depth",
) -> Tensor:
    """(n,) base + s (tensor - base), s = alpha + beta l / (L - 1) in layer l of L; alpha if L = 1.

    Without `beta` it is 1 - alpha: the last layer stays as merged. Outside the layers, `outside: depth` gives the
    embeddings alpha and what follows the last layer (final norm, head) alpha + beta; `outside: alpha` gives all alpha.
    """
    beta = 1 - alpha if beta is None else beta
    if layer is not None:
        index, count = layer
        depth = index / (count - 1) if count > 1 else 0.0
    else:
        depth = 0.0 if outside == "alpha" or is_embedding(name) else 1.0
    return base + (tensor - base) * (alpha + beta * depth)
