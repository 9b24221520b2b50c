"""CABS: task vectors pruned in turn so that no two keep the same weight (Yang et al. 2025, arXiv:2503.01874)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusion.merge._x import Outputs, Sum, keep_counts, numbers

UNIT = "tensor"
SEQUENTIAL = True
SYMMETRIC = False
NEUTRAL = {"density": 1.0}
PIECE = 4096  # blocks sorted at a time: the order takes twice their memory


def cabs(
    tensors: Iterator[Tensor],  # one (*shape) after another
    base: Tensor,
    weights: Tensor,
    *,
    density: float | Sequence[float] = 0.25,
    block: int = 256,
    scale: float = 1.0,
) -> Outputs:
    """(*shape) base + scale sum w_t d_t over the entries that d_t keeps, none of them kept by an earlier model.

    n:m pruning: of every `block` entries in a row the max(1, floor(density * block)) of largest magnitude among those
    not taken, earlier ones first where they tie; density 0.25 and block 256 is 64:256. With block 0 the whole tensor is
    one block, and everything that ties with the last entry kept is kept too. Zeros are never kept. Raises ValueError
    for a negative block.
    """
    if block < 0:
        raise ValueError(f"cabs: block counts entries, 0 for the whole tensor, and is {block}")
    densities = numbers(density, len(weights), "density", 0.0, 1.0)
    out, taken, kept = base.clone(), torch.zeros_like(base, dtype=torch.bool), []
    for tensor, weight, share in zip(tensors, weights.tolist(), densities, strict=True):
        d = (tensor - base).masked_fill(taken, 0.0)
        mine = _largest(d.abs().flatten(), share, block).view_as(d)
        out += d * mine * (weight * scale)
        taken |= mine
        kept.append(mine.sum())
    return Outputs(out, {"kept": Sum(torch.stack(kept))})


def _largest(x: Tensor, density: float, block: int) -> Tensor:  # (n,) magnitudes
    """(n,) bool: the largest entries of every block of x, or of x as a whole."""
    if density == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    if block == 0:
        return (x >= x.topk(_count(density, len(x))).values[-1]) & (x > 0)
    mask = torch.zeros_like(x, dtype=torch.bool)
    for start in range(0, len(x), block * PIECE):
        part, marks = x[start : start + block * PIECE], mask[start : start + block * PIECE]
        whole = len(part) // block * block
        _mark(part[:whole].view(-1, block), marks[:whole].view(-1, block), density)
        _mark(part[None, whole:], marks[None, whole:], density)
    return mask & (x > 0)


def _mark(x: Tensor, marks: Tensor, density: float) -> None:  # (rows, m)
    """Sets in `marks` the largest entries of every row."""
    if x.numel():
        first = x.argsort(dim=1, descending=True, stable=True)[:, : _count(density, x.shape[1])]
        marks.scatter_(1, first, True)


def _count(density: float, n: int) -> int:
    return keep_counts([density], [n])[0]
