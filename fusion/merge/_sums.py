"""Float64 sums whose bits depend on the entries alone: not on chunks, threads, batch or machine.

Within a block of 4,096 entries 512 lanes each add their 8 entries in order (lane j has entries j, j + 512, ...), the
lanes are folded in halves, and blocks are added by a binary tree. A short last block counts as filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusion.merge._compiled import address, loops

BLOCK = 4096
LANES = 512
_PIECE = 32 * BLOCK  # what stays in a core's cache while it is widened and folded


def tree(parts: Tensor) -> Tensor:  # (m, ...)
    """(...) sum of the parts: neighbours are added level by level, an odd last one is carried."""
    if len(parts) == 0:
        return parts.new_zeros(parts.shape[1:])
    while len(parts) > 1:
        even = len(parts) // 2 * 2
        added = parts[0:even:2] + parts[1:even:2]
        parts = added if even == len(parts) else torch.cat([added, parts[even:]])
    return parts[0]


def total(x: Tensor) -> Tensor:  # (..., n)
    """(...) float64 sums over the last axis."""
    sums = []
    for steps in _pieces(x):
        lanes = steps[..., 0, :].clone()
        for step in range(1, steps.shape[-2]):
            lanes += steps[..., step, :]
        sums.append(_folded(lanes).movedim(-1, 0))
    return tree(torch.cat(sums)) if sums else x.new_zeros(x.shape[:-1], dtype=torch.float64)


def row_total(x: Tensor, rows: int) -> Tensor:  # (..., rows * length)
    """(..., rows) float64 sums of the rows; each by itself, so that it does not matter which rows a chunk holds."""
    each = x.reshape(-1, x.shape[-1] // rows)
    at_once = max(1, _PIECE // max(1, each.shape[1]))
    return torch.cat([total(part) for part in each.split(at_once)]).view(*x.shape[:-1], rows)


def row_length(shape: Sequence[int]) -> int:
    """Numbers behind one index of the first axis; a vector is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else max(math.prod(shape), 1)


def whole_rows(shape: Sequence[int], chunk: int) -> int:
    """The entries of 2^m whole rows, at most `chunk` of them unless one row is more."""
    length = row_length(shape)
    return length * (1 << max(0, (chunk // length).bit_length() - 1))


def gram(vectors: Tensor, origin: Tensor | None = None) -> Tensor:  # (m, n) float32, (n,)
    """(m, m) float64 inner products of the vectors, or of vectors - origin, which are float32, too; the products of two
    float32 are exact in float64."""
    m, n = vectors.shape
    if n == 0:
        return vectors.new_zeros((m, m), dtype=torch.float64)
    if (compiled := loops(vectors)) is not None:
        vectors, (rows, scratch) = vectors.contiguous(), workspace(m)
        products = torch.empty(-(-n // BLOCK), m, m, dtype=torch.float64)
        given = [one.data_ptr() for one in (rows, scratch, products)]
        compiled.block_products(vectors.data_ptr(), m, n, address(origin), *given)
        return tree(products)
    parts, vectors = [], vectors if origin is None else vectors - origin
    for steps in _pieces(vectors):
        out = steps.new_zeros(m, m, steps.shape[1])
        for i in range(m):
            lanes = steps[i, :, 0] * steps[: i + 1, :, 0]
            for step in range(1, steps.shape[-2]):
                lanes.addcmul_(steps[i, :, step], steps[: i + 1, :, step])
            out[i, : i + 1] = out[: i + 1, i] = _folded(lanes)
        parts.append(out.movedim(-1, 0))
    return tree(torch.cat(parts))


def workspace(m: int) -> tuple[Tensor, Tensor]:
    """Room for what the compiled products of m rows keep: a block of each, and its products lane by lane."""
    return torch.empty(m, BLOCK), torch.empty(m * 128 + m * m * (LANES + 1), dtype=torch.float64)


def squares(vectors: Tensor, origin: Tensor | None = None) -> Tensor:  # (m, n) float32, (n,)
    """(m,) float64 sums of squares: the diagonal of `gram`."""
    m, n = vectors.shape
    if (compiled := loops(vectors)) is not None and n > 0:
        vectors, sums = vectors.contiguous(), torch.empty(-(-n // BLOCK), m, dtype=torch.float64)
        compiled.block_squares(vectors.data_ptr(), m, n, address(origin), sums.data_ptr())
        return tree(sums)
    vectors = vectors if origin is None else vectors - origin
    # one by one, since float64 takes twice the memory; in it, since the square of 1e-25 is no float32
    return torch.stack([total(one.double().square_()) for one in vectors])


def _pieces(x: Tensor) -> Iterator[Tensor]:  # (..., n)
    """(..., blocks, steps, LANES) float64, some blocks at a time."""
    # of a tensor shorter than a block, steps that would add nothing but zeros are left out
    block = min(BLOCK, -(-x.shape[-1] // LANES) * LANES)
    for start in range(0, x.shape[-1], _PIECE):
        piece = x[..., start : start + _PIECE]
        short = -piece.shape[-1] % block
        piece = pad(piece, (0, short)) if short else piece
        yield piece.unflatten(-1, (-1, block // LANES, LANES)).double()


def _folded(lanes: Tensor) -> Tensor:  # (..., LANES)
    """(...) sums of the lanes."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
