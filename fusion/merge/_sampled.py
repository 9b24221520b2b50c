"""Sums over every 16th block of 4,096 entries of a tensor: enough to tell how models lie to each other."""

import torch
from torch import Tensor

from fusion.merge._compiled import address, loops
from fusion.merge._sums import BLOCK, gram, workspace

EVERY = 16


def sampled(
    tensors: Tensor,  # (K, n) float32: a region of K models
    base: Tensor | None,  # (n,)
    out: Tensor,  # (n,) what was made of them
    start: int,  # where in the tensor the region begins
) -> tuple[Tensor, Tensor]:
    """(K + 2, K + 2) float64 inner products, over the sampled entries, of models and result less the base, and of the
    base (without one the models' mean); (2,) int64 how many entries they are, and of how many the models' signs differ.
    """
    k, n = tensors.shape
    if (compiled := loops(tensors)) is None:
        return _by_torch(tensors, base, out, start)
    tensors, out, base = tensors.contiguous(), out.contiguous(), None if base is None else base.contiguous()
    rows, scratch = workspace(k + 2)
    products, counts = torch.zeros(k + 2, k + 2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    given = tensors.data_ptr(), k, n, address(base), out.data_ptr(), start, EVERY
    compiled.sample(*given, *(one.data_ptr() for one in (rows, scratch, products, counts)))
    return products, counts


def _by_torch(tensors: Tensor, base: Tensor | None, out: Tensor, start: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(start, start + len(out), device=out.device)
    chosen = places // BLOCK % EVERY == 0
    rows = tensors[:, chosen]
    origin = rows.mean(0) if base is None else base[chosen]
    d = rows - origin
    conflict = torch.count_nonzero((d.amin(0) < 0) & (d.amax(0) > 0))
    found = torch.cat([d, (out[chosen] - origin)[None], origin[None]])
    return gram(found).cpu(), torch.tensor([found.shape[1], int(conflict)])
