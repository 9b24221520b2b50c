"""Iso-C: the summed task vector with all its singular values made equal (Marczak et al. 2025, arXiv:2502.04959).

With D = sum_t w_t d_t = U S V^T the merged weight is base + scale * mean(S) * U V^T, and U V^T is the polar factor of
D. The mean is over the singular values that D has (its rank, which is the shorter side unless D is deficient), so the
nuclear norm stays what it was and nothing enters in directions that no model moved in. Every 2-D tensor is a matrix,
embeddings and heads too; all others (vectors, convolutions, packed experts) get base + scale * mean_t(w_t d_t).
Memory beside the inputs: 2 tensors, and the square of the shorter side in float64.
"""

from torch import Tensor

from fusion.merge._linalg import axes, cross, inverse, mean_task, onto, sum_of_tasks, tall, times

UNIT = "tensor"


def iso_c(tensors: Tensor, base: Tensor, weights: Tensor, *, scale: float = 1.0) -> Tensor:  # (K, *shape), (*shape)
    """(*shape) the base moved along the sum of task vectors with an isotropic spectrum; D = 0 leaves the base."""
    if base.dim() != 2:
        return mean_task(tensors, base, weights, scale)
    total = sum_of_tasks(tensors, base, weights)
    x = tall(total)
    s, v = axes(cross(x, x), len(x))
    mean = s.sum() / (s > 0).sum().clamp(min=1)
    times(x, (v * (mean * inverse(s))) @ v.mT, out=x)
    return onto(base, total, scale)
