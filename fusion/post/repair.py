"""REPAIR by weights alone: rows as long as the models' are on average (after Jordan et al. 2022, arXiv:2211.08403).

A mean of rows that point apart is shorter than they are, so that its unit varies less, layer after layer. REPAIR gives
each unit the mean of the models' deviations on data; of a unit that reads white inputs these are lengths of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = "row"


def repair(
    tensor: Tensor,  # (rows * in,) merged, whole rows
    tensors: Tensor,  # (K, rows * in)
    weights: Tensor,  # (K,)
    *,
    shape: tuple[int, ...],
    most: float = 2.0,
) -> Tensor:
    """(rows * in,) row j of a matrix times sum_k w_k |row j of model k| / |row j|, w_k = |weight k| / sum of them.

    A factor is at most `most`, below which a mean of two rows at a right angle stays. Vectors (gains, biases) stay as
    they are. Raises ValueError after a method that takes models one after another, for `most` below 1 and for weights
    that are all 0.
    """
    if most < 1:
        raise ValueError(f"repair: most is {most:g}; allowed are numbers from 1")
    if not isinstance(tensors, Tensor):
        raise ValueError("repair: it compares rows of all models, and this method takes them one after another")
    if not bool(weights.any()):
        raise ValueError("repair: all weights are 0, so that no model's rows say how long the merged ones should be")
    if len(shape) < 2:
        return tensor.clone()
    width = math.prod(shape[1:])
    merged, own = tensor.reshape(-1, width), tensors.reshape(len(tensors), -1, width)
    shares = weights.abs().double() / weights.abs().double().sum()
    wanted = (shares[:, None] * own.double().norm(dim=2)).sum(0)
    length = merged.double().norm(dim=1)
    factor = torch.where(length > 0, wanted / torch.where(length > 0, length, 1.0), 1.0).clamp(max=most)
    return (merged * factor.to(merged)[:, None]).flatten()
