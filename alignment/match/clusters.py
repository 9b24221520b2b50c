"""Clusters of units around their best matches: a network is narrowed to the units of a smaller one, each donor unit
whole. The hard case of a transport plan; neither side's sums are asked to be even."""

import torch
from torch import Tensor

from alignment.match.hungarian import hungarian


def clusters(similarity: Tensor) -> Tensor:  # (n, m), larger is better
    """(n, m) float64 coupling in which every donor unit goes whole, with mass 1 / m, to the target unit that it is
    likest; the units of the best one-to-one match stay together, so that no target unit is without one.

    Where there are fewer donor units, every target unit is whole a copy of the donor unit that it is likest. Of as many
    units it is that match over n. Raises ValueError where a similarity is not finite.
    """
    n, m = similarity.shape
    if n > m:
        return clusters(similarity.T).T
    match = hungarian(similarity)
    owner = similarity.detach().cpu().argmax(0)
    owner[match] = torch.arange(n)
    coupling = torch.zeros(n, m, dtype=torch.float64)
    coupling[owner, torch.arange(m)] = 1 / m
    return coupling
