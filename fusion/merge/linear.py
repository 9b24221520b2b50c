"""Weighted average of the models ("model soup", Wortsman et al. 2022, arXiv:2203.05482)."""

from torch import Tensor

from fusion.merge._x import weighted

NEUTRAL = {"normalize": True}


def equal_stays(weights: Tensor, *, normalize: bool) -> bool:
    return normalize or float(weights.double().sum()) == 1.0


def linear(tensors: Tensor, weights: Tensor, *, normalize: bool = True) -> Tensor:  # (K, n), (K,)
    """(n,) sum(w t) / sum(w), without `normalize` sum(w t). Weights may be negative.

    Raises ValueError when it has to divide by weights that add up to 0.
    """
    if normalize:
        whole = weights.double().sum()
        if whole == 0:
            raise ValueError(
                f"linear divides by the sum of the weights, and {weights.tolist()} add up to 0; give other weights, "
                f"or normalize: false"
            )
        weights = (weights.double() / whole).float()
    return weighted(tensors, weights)
