"""Uncertainty-based gradient matching: task vectors weighted by curvature (Daheim et al. 2023, arXiv:2310.12808).

theta = theta_0 + scale * sum_t w_t (H_0 + H_t) / (H_0 + sum_s w_s H_s) d_t, all diagonal. H_t is the statistic
"fisher" (squared gradients are the usual estimate of a Hessian's diagonal), shaped like the tensor; every merged tensor
needs one. H_0 is `prior`, plus the statistic "base_fisher", the base's own curvature, where the models' files have it
(their mean, since it is one and the same). A large H_0 gives task arithmetic.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge._statistics import positive

INPUTS = {"fisher": "element", "base_fisher": "element"}
OPTIONAL = ("base_fisher",)
NEUTRAL = {"scale": 1.0}


def uncertainty(
    tensors: Tensor,  # (K, n)
    base: Tensor,  # (n,)
    weights: Tensor,  # (K,)
    *,
    inputs: Mapping[str, Tensor],
    name: str,
    scale: float = 1.0,
    prior: float = 1e-12,
) -> Tensor:
    """(n,) the base moved by curvature-weighted task vectors; where the whole curvature is not above 0 (negative
    weights, or no information and prior 0) by sum_t w_t d_t.

    Raises ValueError for a negative prior and for a negative entry of a statistic.
    """
    if prior < 0:
        raise ValueError(f"uncertainty: prior is {prior}; it is a curvature and can't be below 0")
    curvatures = positive("uncertainty", name, "fisher", inputs["fisher"])
    start = torch.full_like(base, prior)
    given: Tensor | None = inputs["base_fisher"]
    if given is not None:
        start += positive("uncertainty", name, "base_fisher", given).mean(0)
    whole, moved, plain = start.clone(), torch.zeros_like(base), torch.zeros_like(base)
    for tensor, curvature, weight in zip(tensors, curvatures, weights.tolist()):
        task = (tensor - base).mul_(weight)
        plain += task
        whole.add_(curvature, alpha=weight)
        moved.addcmul_(task, start + curvature)
    return torch.where(whole > 0, moved / whole, plain).mul_(scale).add_(base)
