"""Task arithmetic: the base plus a weighted sum of task vectors (Ilharco et al. 2022, arXiv:2212.04089)."""

from torch import Tensor

from fusion.merge._x import weighted

NEUTRAL = {"scale": 1.0}


def task_arithmetic(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    scale: float = 1.0,
) -> Tensor:
    """(n,) base + scale * sum w (t - base); weights are not divided by their sum, and a negative one forgets a task."""
    return weighted(tensors, weights, base, scale)
