"""WIDEN: models weighted by how far they moved a column's length and direction (Yu et al. 2024, arXiv:2408.03092)."""

import torch
from torch import Tensor

from fusion.merge._x import is_embedding

UNIT = "tensor"
NEUTRAL = {"calibration": 1.0}
SLAB = 1 << 16  # entries that are float64 at a time: they stay in a core's cache


def widen(
    tensors: Tensor,  # (K, *shape)
    base: Tensor,
    *,
    name: str,
    ratio: float = 1.0,
    calibration: float = 1.0,
) -> Tensor:
    """(*shape) base + sum of s_t d_t, a weight s_t for every column of a matrix: (m_t + v_t) / 2.

    m_t is the softmax over models of the rank, within model t, of |length of the column - the base's|, in [0, 1); v_t
    the same of 1 - cos(column, the base's). A rank above `ratio` times its mean scores `calibration` instead.
    Embeddings go by rows, one token each; a vector goes by entries, ranked by |d_t|. Axes behind the first make up the
    columns.
    """
    if tensors.dim() < 3:
        d = (tensors - base).view(len(tensors), -1)
        scores = _score(d.abs(), ratio, calibration)
        return base + (scores * d).sum(0).view_as(base)
    by_rows = is_embedding(name)
    matrices, start = tensors.flatten(2), base.flatten(1)
    moved = [_moved(matrix, start, by_rows) for matrix in matrices]
    longer, turned = (_score(torch.stack(one), ratio, calibration) for one in zip(*moved, strict=True))
    scores = (longer + turned).div_(2).float().unsqueeze(2 if by_rows else 1)
    out = start.clone()
    for matrix, score in zip(matrices, scores, strict=True):
        out += (matrix - start).mul_(score)
    return out.view(base.shape)


def _moved(matrix: Tensor, start: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:  # (rows, columns)
    """(columns,) float64 each: |length - the base's length|, and 1 - cosine (0 where both are zero, 1 where one is)."""
    rows, columns = matrix.shape
    sums = torch.zeros(3, rows if by_rows else columns, dtype=torch.float64, device=matrix.device)
    step = max(1, SLAB // columns)
    for at in range(0, rows, step):
        a, b = matrix[at : at + step].double(), start[at : at + step].double()
        found = torch.stack([(x * y).sum(int(by_rows)) for x, y in ((a, a), (b, b), (a, b))])
        (sums[:, at : at + step] if by_rows else sums).add_(found)
    length, base_length = sums[0].sqrt(), sums[1].sqrt()
    product = length * base_length
    turned = 1 - sums[2] / product.where(product > 0, 1.0)
    return (length - base_length).abs(), turned.where(product > 0, (length != base_length).double())


def _score(moved: Tensor, ratio: float, calibration: float) -> Tensor:  # (K, columns)
    """(K, columns) softmax over models of ranks / columns, `calibration` where a rank is above ratio times the mean."""
    columns = moved.shape[1]
    rank = torch.empty_like(moved).scatter_(
        1, moved.argsort(dim=1, stable=True), torch.arange(columns, device=moved.device).to(moved).expand_as(moved)
    )
    rank = rank / columns
    return torch.softmax(rank, 0).masked_fill(rank > rank.mean(1, keepdim=True) * ratio, calibration)
