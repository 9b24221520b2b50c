"""Nearswap: the first model moved towards the second, onto it where they are near (mergekit's method of that name)."""

from torch import Tensor

MODELS = (2, 2)
SYMMETRIC = False


def nearswap(tensors: Tensor, *, t: float) -> Tensor:  # (2, n)
    """(n,) a + clip(b - a, -t, t): b where they differ by t at most, else a moved by t towards b.

    The same as w b + (1 - w) a with w = clip(t / |a - b|, 0, 1). Raises ValueError for a negative t.
    """
    if t < 0:
        raise ValueError(f"nearswap: t is a distance, 0 or more, not {t}")
    a, b = tensors
    difference = b - a
    return b.where(difference.abs() <= t, a + difference.clamp(-t, t))
