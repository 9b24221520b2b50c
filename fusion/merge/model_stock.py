"""Model stock: the mean of fine-tuned models pulled towards their base by the angle between them (Jang et al. 2024,
arXiv:2403.19522)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.merge._x import Reading, Sum, gram, weighted

NEUTRAL: dict[str, float] = {}


def statistics(tensors: Tensor, base: Tensor) -> dict[str, Reading]:
    return {"gram": Sum(gram(tensors, base))}


def settle(stats: Mapping[str, Tensor], *, norm_floor: float) -> dict[str, Tensor]:
    products = stats["gram"]
    count = len(products)
    if count == 1:
        return {"share": torch.ones(())}
    norms = products.diagonal().clamp(min=0).sqrt()
    norm_products = (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp(min=norm_floor)
    cosines = products / norm_products.where(norm_products > 0, 1.0)
    c = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    spread = 1 + (count - 1) * c
    return {"share": torch.where(spread > 1e-6, count * c / spread.clamp(min=1e-6), 0.0)}


def model_stock(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor], norm_floor: float = 0.0) -> Tensor:
    """(n,) base + s mean(d_t), s = K c / (1 + (K - 1) c), c the mean cosine of all pairs of this tensor's task vectors.

    |d_i| |d_j| is at least `norm_floor`; a zero task vector has cosine 0. One model comes out as itself. A negative c
    steps away from the models, as the formula says; at c = -1 / (K - 1) the task vectors cancel and the base comes out.
    """
    return weighted(tensors, (stats["share"] / len(tensors)).expand(len(tensors)), base)
