"""A network in balanced units: what writers and readers of a unit can trade is shared out evenly.

After it only rotations, permutations, phases and signs are left of each group, all of which keep norms, so that two
networks can be compared by inner products. A scale becomes the one at which a unit's writers and readers have equal
norms. An invertible matrix becomes S with S G S^T = S^-T H S^-1 for the Gram matrices G and H of writers and readers:
S^T S is the geometric mean of G^-1 and H (Pusz and Woronowicz 1975).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Turn
from alignment._chain import even
from alignment.spaces import Part, Space, Spaces


def blocks_of(spaces: Spaces, tensors: Mapping[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
    """All parts that a checkpoint has, in one precision, as the network uses them; rows of the vocabulary as they
    correspond."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
    found = {}
    for part in spaces.parts:
        if all(name in tensors for name in part.names):
            block = (part.read(tensors).to(dtype) + part.offset) * part.factor
            names = [axis.space for axis in part.axes]
            if rows is not None and "vocabulary" in names:
                block = block.index_select(names.index("vocabulary"), rows)
            if not bool(torch.isfinite(block.sum(dtype=torch.float64))):
                raise ValueError(f"{part.names[0]} holds nan or infinity")
            found[part.key] = block
    return found


def balance(spaces: Spaces, blocks: Mapping[str, Tensor]) -> dict[str, Map]:
    """By space the map into balanced units, for the groups that scale; `blocks` are a network's parts by key."""
    found: dict[str, Map] = {}
    for space in spaces.spaces:
        uses = [(part, number) for part, number in spaces.uses[space.name] if part.key in blocks]
        rows = {
            role: [unfold(spaces, part, n, blocks[part.key]) for part, n in uses if part.axes[n].role == role]
            for role in ("w", "r")
        }
        if rows["w"] and rows["r"]:
            map = _balance(space, rows["w"], rows["r"])
            if map is not None:
                found[space.name] = map
    return even(spaces, blocks, found)


def unfold(spaces: Spaces, part: Part, number: int, block: Tensor) -> Tensor:
    """(copies, n, F): the rows of a space's units in a part; (1, n, F) where the space has no copies."""
    copies = spaces.within_axis(part, number)
    if copies is None:
        return block.movedim(number, 0).flatten(1)[None] if block.dim() > 1 else block[None, :, None]
    front = block.movedim((copies, number), (0, 1))
    return front.flatten(2) if front.dim() > 2 else front[..., None]


def pairs(rows: Tensor) -> Tensor:
    """(..., n, F) rows as (..., n / 2, F) complex ones: coordinate i and i + n/2 are one number."""
    real, imaginary = rows.unflatten(-2, (2, -1)).unbind(-3)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _balance(space: Space, writers: list[Tensor], readers: list[Tensor]) -> Map | None:
    group, copied = space.group, space.within is not None
    if group in ("scaled permutation", "positive permutation"):
        scale = _even(writers, readers)
        index = torch.arange(space.size).expand_as(scale).contiguous()
        return Index(index, scale) if copied else Index(index[0], scale[0])
    if group in ("pair turns", "pair scales"):
        scale = _even([pairs(rows) for rows in writers], [pairs(rows) for rows in readers]).to(torch.complex128)
        return Turn(scale if copied else scale[0])
    if group == "general linear":
        write, read = _roots(_gram(writers), _gram(readers))
        return Matrix(write, read) if copied else Matrix(write[0], read[0])
    return None


def _even(writers: list[Tensor], readers: list[Tensor]) -> Tensor:
    """(copies, n) scales at which writers and readers have the same norm; 1 for a unit that one of them leaves out."""
    written = sum(rows.abs().double().square().sum(-1) for rows in writers)
    read = sum(rows.abs().double().square().sum(-1) for rows in readers)
    assert isinstance(written, Tensor) and isinstance(read, Tensor)
    live = (written > 0) & (read > 0)
    return torch.where(live, read / torch.where(live, written, 1), 1).pow(0.25).cpu()


def _gram(rows: list[Tensor]) -> Tensor:
    total = sum(one.double() @ one.double().mT for one in rows)
    assert isinstance(total, Tensor)
    return total.cpu()


def _roots(written: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """S and its inverse (copies, n, n) for Gram matrices of writers and readers."""
    root, back = _power(written, 0.5), _power(written, -0.5)
    mean = back @ _power(root @ read @ root, 0.5) @ back
    return _power(mean, 0.5), _power(mean, -0.5)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix; directions without mass count as 1e-12 of the largest."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 1e-12 * values.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (vectors * values.clamp_min(0).maximum(floor).pow(exponent)[..., None, :]) @ vectors.mT
