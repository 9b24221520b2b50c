"""TSV-M: the leading singular triplets of every task vector, decorrelated (Gargiulo et al. 2025, arXiv:2412.00081).

Each w_t d_t keeps its first r / K of r = min(shape) singular triplets (at least one); the left vectors of all models
side by side are replaced by their polar factor, the right ones likewise, and U S V^T is put together again. One model
of weight 1 comes out as itself. Models that agree share the subspace evenly: together they give the truncated one.
Every 2-D tensor is a matrix, embeddings and heads too; all others get base + scale * mean_t(w_t d_t).
Memory beside the inputs: 3 tensors, and 3 + K / 2 times the square of the shorter side in float64.
"""

import torch
from torch import Tensor

from fusion.merge._linalg import axes, cross, inverse, inverse_root, mean_task, onto, tall, times

UNIT = "tensor"
NEUTRAL = {"scale": 1.0}


def tsv_m(tensors: Tensor, base: Tensor, weights: Tensor, *, scale: float = 1.0) -> Tensor:  # (K, *shape), (*shape)
    """(*shape) base + scale * (sum of truncated task vectors whose singular vectors no longer overlap)."""
    if base.dim() != 2:
        return mean_task(tensors, base, weights, scale)
    start = tall(base)
    rows, r = start.shape
    kept = max(1, r // len(tensors))
    left = torch.empty(rows, len(tensors) * kept, dtype=torch.float32, device=base.device)
    values, right = [], []
    for t, (tensor, weight) in enumerate(zip(tensors, weights)):
        task = tall(tensor) - start
        s, v = axes(cross(task, task), rows)
        s, v = s[:kept], v[:, :kept]
        times(task, v * inverse(s), out=left[:, t * kept : (t + 1) * kept])
        values.append(s * weight)  # a negative weight turns the triplet round
        right.append(v * (s > 0))
    v = torch.cat(right, 1)
    core = (inverse_root(cross(left, left), rows) * torch.cat(values)) @ (v @ inverse_root(v.mT @ v, r)).mT
    merged = times(left, core)
    return onto(base, merged if start is base else merged.mT, scale)
