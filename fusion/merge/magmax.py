"""MagMax: of every weight the change of largest magnitude (Marczak et al. 2024, arXiv:2407.06322)."""

from torch import Tensor

from fusion.merge._x import deltas, scaled

NEUTRAL = {"scale": 1.0}


def magmax(tensors: Tensor, base: Tensor, *, scale: float = 0.5) -> Tensor:  # (K, n), (n,)
    """(n,) base + scale d_t with the t of largest |d_t|, entry by entry; of equal magnitudes the positive one."""
    d = deltas(tensors, base)
    highest, lowest = d.amax(0), d.amin(0)
    return scaled(base, highest.where(highest + lowest >= 0, lowest), scale)
