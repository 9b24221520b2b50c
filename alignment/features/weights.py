"""A unit is what is written into it and what is read from it: the rows and columns of its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # the same part of target and donor, (copies, n, F) and (copies, m, F)


def weights(pairs: Sequence[Pair], scaled: bool = False) -> Tensor:
    """(copies, n, m) inner products of units, each part divided by the root mean squares of both its tensors.

    So every number of every part has the same say, whatever its tensor's scale, where the published weight matching
    (Ainsworth et al. 2022, arXiv:2209.04836) lets tensors of large norm decide. Complex pairs are conjugated. `scaled`
    parts are in proportion already and taken as they are.
    """
    total: Tensor | None = None
    for target, donor in pairs:
        one = target @ donor.mH
        if not scaled:
            one.mul_(scale(target, donor))
        total = one if total is None else total.add_(one)
    assert total is not None, "a space without parts has no units to compare"
    return total


def scale(target: Tensor, donor: Tensor) -> float:
    """One over the product of root mean squares; 0 where one of the two is all zero."""
    norms = float(torch.linalg.vector_norm(target)) * float(torch.linalg.vector_norm(donor))
    return (target.numel() * donor.numel()) ** 0.5 / norms if norms > 0 else 0.0
