"""RegMean: the linear layer whose outputs are nearest to every model's on its own inputs (Jin et al. 2023,
arXiv:2212.09849).

W = (sum_t w_t W_t G_t) (sum_t w_t G_t)^-1, with G_t = E[x x^T] of the inputs of model t's layer (weights are [out, in])
and its off-diagonal multiplied by `off_diagonal`. `ridge` times the mean diagonal of all Grams is added to each one's
diagonal, which draws towards the mean of the models. Input directions that no model has seen keep that mean exactly.
The Gram matrices are the statistic "gram", (in, in) each. A tensor that no model has one for (norms, biases,
embeddings) is averaged, as in the paper: sum_t w_t W_t / sum_t w_t. Memory beside the inputs: 2 tensors, and 6 times
the square of the input side in float64.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion.merge._linalg import times
from fusion.merge._statistics import average, complete, shaped, shrunk

UNIT = "tensor"
INPUTS = {"gram": "tensor"}
NEUTRAL: dict[str, float] = {}


def regmean(
    tensors: Tensor,  # (K, out, in), or (K, *shape) without Gram matrices
    weights: Tensor,  # (K,)
    *,
    inputs: Mapping[str, Sequence[Tensor | None] | None],
    name: str,
    off_diagonal: float = 0.9,
    ridge: float = 0.0,
) -> Tensor:
    """(*shape) the weights that solve all models' regressions at once.

    Raises ValueError for a negative weight, weights that are all 0, a Gram matrix that only some models have or that
    does not fit the layer, and parameters out of range.
    """
    if not 0 <= off_diagonal <= 1 or ridge < 0:
        raise ValueError(f"off_diagonal is {off_diagonal} and ridge {ridge}; allowed are 0 to 1, and 0 or more")
    mean = average("regmean", tensors, weights)
    found = complete("regmean", name, "gram", inputs["gram"])
    if not found:
        return mean
    side = (tensors.shape[-1],) * 2
    found = [gram.to(mean.device) for gram in shaped("regmean", name, "gram", found, side)]
    shares = (weights.double() / weights.double().sum()).tolist()
    added = ridge * float(sum(gram.diagonal().double().mean() for gram in found)) / len(found)
    whole = torch.zeros_like(found[0], dtype=torch.float64)
    for gram, share in zip(found, shares):
        whole.add_(shrunk(gram, off_diagonal, added), alpha=share)
    solver = _inverse(whole)
    moved = torch.zeros_like(mean)
    for tensor, gram, share in zip(tensors, found, shares):
        if share:
            moved += times(tensor - mean, shrunk(gram, off_diagonal, added) @ solver * share)
    return moved.add_(mean)


def _inverse(gram: Tensor) -> Tensor:  # (n, n) float64, symmetric, positive semi-definite
    """(n, n) its inverse on the directions that exist, channels brought to one scale before it is judged which do."""
    root = gram.diagonal().clamp(min=0).sqrt()
    unit = torch.where(root > 0, 1 / root, 0.0)
    values, vectors = torch.linalg.eigh(unit[:, None] * gram * unit)
    seen = values > len(gram) * torch.finfo(torch.float32).eps
    return unit[:, None] * ((vectors * torch.where(seen, 1 / values, 0.0)) @ vectors.mT) * unit
