"""Elements of the groups of `alignment.spaces.GROUPS`: drawing one, and saying why a map is none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Turn
from alignment.spaces import Space

CLOSE = 1e-5  # a matrix counts as orthogonal, or as another's inverse, within this; maps are kept in float64
KINDS: dict[str, type] = {
    **dict.fromkeys(("permutation", "signed permutation", "scaled permutation", "positive permutation"), Index),
    **dict.fromkeys(("orthogonal", "orthogonal fixing ones", "general linear"), Matrix),
    **dict.fromkeys(("pair turns", "pair scales", "pair signs"), Turn),
}
SAY = {
    "pair turns": "under rotary embeddings each pair of coordinates has its frequency: it may turn and scale, not move",
    "pair signs": "between a query or key norm and rotary embeddings a pair of coordinates may only change its sign",
    "fixed": "nothing of it may move",
    "permutation": "its units may only change places: a sign or a scale does not pass its non-linearity or norm",
    "signed permutation": "norm gains lie on its units, which may only change places and signs; fold them to rotate",
    "orthogonal fixing ones": "a LayerNorm subtracts the mean, so the map must keep it",
}


def draw(space: Space, copies: int, generator: torch.Generator) -> Map | None:
    """A random element of a space's group, condition numbers at most e; None where all is fixed.

    Of pair scales, which act on gains alone, it draws positive ones near 1, as gains are that were trained from 1 on.
    """
    lead = (copies,) if space.within is not None else ()
    n = space.size

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*lead, *shape, generator=generator, dtype=torch.float64)

    def signs(*shape: int) -> Tensor:
        return torch.where(uniform(*shape) < 0.5, -1.0, 1.0).double()

    kind, group = KINDS.get(space.group), space.group
    if kind is None:
        return None
    if kind is Index:
        index = uniform(n).argsort(-1)
        if group == "permutation":
            return Index(index)
        if group == "signed permutation":
            return Index(index, signs(n))
        scale = torch.exp(uniform(n) - 0.5)
        return Index(index, scale * signs(n) if group == "scaled permutation" else scale)
    if kind is Turn:
        if group == "pair signs":
            return Turn(signs(n // 2).to(torch.complex128))
        scale = torch.exp(uniform(n // 2) - 0.5)
        if group == "pair scales":
            return Turn(scale.sqrt().to(torch.complex128))
        return Turn(torch.polar(scale, 2 * math.pi * uniform(n // 2)))

    def rotation(size: int) -> Tensor:
        normal = torch.randn(*lead, size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # so that q is uniform

    if group == "orthogonal":
        q = rotation(n)
        return Matrix(q, q.mT.contiguous())
    if group == "orthogonal fixing ones":
        rest = complement(n)
        q = torch.full((n, n), 1 / n, dtype=torch.float64) + rest @ rotation(n - 1) @ rest.mT
        return Matrix(q, q.mT.contiguous())
    left, right, stretch = rotation(n), rotation(n), torch.exp(uniform(n) - 0.5)
    return Matrix((left * stretch[..., None, :]) @ right, right.mT @ (left / stretch[..., None, :]).mT)


def complement(n: int) -> Tensor:
    """(n, n - 1): an orthonormal basis of what is orthogonal to the vector of ones."""
    ones = torch.ones(n, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones, torch.eye(n, n - 1, dtype=torch.float64)], 1))[0][:, 1:]


def why_not(space: Space, copies: int, map: Map) -> str | None:
    """Why a map is no element of a space's group, as the rest of a sentence; None where it is one."""
    kind = KINDS.get(space.group)
    if kind is None or not isinstance(map, kind):
        return f"a map of kind {type(map).__name__} does not fit: {_rule(space)}"
    lead = (copies,) if space.within is not None else ()
    if isinstance(map, Index):
        if map.index.shape != (*lead, space.size):
            return f"it has {tuple(map.index.shape)} entries for {(*lead, space.size)} units"
        if not map.index.sort(-1).values.eq(torch.arange(space.size)).all():
            return "its index is no permutation"
        if map.scale is None:
            return None
        scale = map.scale
        if not bool(torch.isfinite(scale).all() and (scale != 0).all()):
            return "a scale of 0 or one that is not finite cannot be undone"
        if space.group == "permutation" and not (scale == 1).all():
            return _rule(space)
        if space.group == "signed permutation" and not (scale.abs() == 1).all():
            return _rule(space)
        return (
            "a ReLU passes positive scales only"
            if space.group == "positive permutation" and (scale < 0).any()
            else None
        )
    if isinstance(map, Turn):
        turn = map.turn
        if turn.shape != (*lead, space.size // 2):
            return f"it has {tuple(turn.shape)} entries for {(*lead, space.size // 2)} pairs"
        if not bool(torch.isfinite(turn.abs()).all() and (turn.abs() > 0).all()):
            return "a scale of 0 or one that is not finite cannot be undone"
        if space.group == "pair scales" and (turn.imag != 0).any():
            return "its pairs may scale and not turn: there is a gain on each coordinate"
        return _rule(space) if space.group == "pair signs" and not (turn**2 == 1).all() else None
    return _why_no_matrix(space, lead, map)


def _why_no_matrix(space: Space, lead: tuple[int, ...], map: Matrix) -> str | None:
    if map.write.shape != (*lead, space.size, space.size) or map.read.shape != map.write.shape:
        return f"its matrices are {tuple(map.write.shape)} and not {(*lead, space.size, space.size)}"
    write, read = map.write.double(), map.read.double()
    eye = torch.eye(space.size, dtype=torch.float64)
    if not bool(torch.isfinite(write).all()) or (write @ read - eye).abs().max() > CLOSE * _size(write) * _size(read):
        return "what readers take does not undo what writers take"
    if space.group == "general linear":
        return None
    if (write - read.mT).abs().max() > CLOSE or (write @ write.mT - eye).abs().max() > CLOSE:
        return "its matrix is not orthogonal"
    moved = (write.sum(-1) - 1).abs().max() > CLOSE
    return _rule(space) if space.group == "orthogonal fixing ones" and moved else None


def _size(matrix: Tensor) -> float:
    return max(1.0, float(matrix.abs().max()))


def _rule(space: Space) -> str:
    return SAY.get(space.group, f"its group is '{space.group}'")
