"""Fisher merging: the average of the models, each entry weighted by how much its model's likelihood depends on it
(Matena & Raffel 2022, arXiv:2111.09832).

theta = sum_t c_t (F_t + floor) theta_t / sum_t c_t (F_t + floor), with c_t = w_t, and with `normalize` w_t / |F_t|,
the L2 norm over all of the model (over the tensor with `scope: tensor`). F_t is the statistic "fisher", the diagonal
of the Fisher information, shaped like the tensor; every merged tensor needs one.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fusion.merge._statistics import check_weights, positive
from fusion.merge._x import Reading, Sum, squares

INPUTS = {"fisher": "element"}
NEUTRAL: dict[str, float] = {}


def passes(*, normalize: bool) -> int:
    return 1 if normalize else 0


def statistics(*, inputs: Mapping[str, Tensor], name: str) -> dict[str, Reading]:
    return {"squares": Sum(squares(positive("fisher", name, "fisher", inputs["fisher"])))}


def fisher(
    tensors: Tensor,  # (K, n)
    weights: Tensor,  # (K,)
    *,
    stats: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    name: str,
    normalize: bool = True,
    floor: float = 1e-6,
    scope: Literal["tensor", "model"] = "model",
) -> Tensor:
    """(n,) the weighted average. Where all weights are 0 (no information, floor 0) it is the average by w_t alone; a
    model whose Fisher is 0 everywhere is not normalised.

    Raises ValueError for a negative weight, weights that are all 0, a negative floor, a negative entry of a Fisher.
    """
    check_weights("fisher", weights)
    if floor < 0:
        raise ValueError(f"fisher: floor is {floor}; it is added to the Fisher information and can't be below 0")
    plain = weights.double() / weights.double().sum()
    if normalize:
        norms = stats["squares"].sqrt()
        coefficients = plain / torch.where(norms > 0, norms, 1.0)
    else:
        coefficients = plain
    shares = (coefficients / coefficients.max()).tolist()  # only their ratios count
    top, bottom = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    mean = torch.zeros_like(tensors[0])
    fishers = positive("fisher", name, "fisher", inputs["fisher"])
    for tensor, information, share, weight in zip(tensors, fishers, shares, plain.tolist()):
        part = (information + floor) * share
        bottom += part
        top.addcmul_(part, tensor)
        mean.add_(tensor, alpha=weight)
    return torch.where(bottom > 0, top / bottom, mean)
