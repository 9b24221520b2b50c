"""The kinds of maps of a space, and how each acts on an axis of a tensor.

A map takes a donor's units to a target's. Writers take one matrix and readers the other, so that what is written and
read again is the same: for a coupling P (donor, target) these are (P / column mass)^T and P / row mass, for an
invertible A they are A and its inverse, for a permutation an index. `copies` maps of one space within another are
stacked, in the order of the target's units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Index:
    """Target unit i is donor unit `index[i]`, writers times `scale[i]`, readers over it; (n,) or (copies, n).

    A donor unit that several target units are is shared out: each has its writers, and an equal part of its readers.
    -1 is no donor unit: zeros.
    """

    index: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Matrix:
    """Writers take `write` (n_target, n_donor), readers `read` (n_donor, n_target); a leading axis for copies."""

    write: Tensor
    read: Tensor


@dataclass(frozen=True)
class Plan(Matrix):
    """A coupling: target units are means of donor units, `even` (n_target, n_donor) on gains, `write` with signs."""

    even: Tensor


@dataclass(frozen=True)
class Turn:
    """Coordinates i and i + n/2 as a complex number: writers times `turn[i]`, readers over its conjugate."""

    turn: Tensor  # (n / 2,) or (copies, n / 2) complex


Map = Index | Matrix | Turn


def act(map: Map, role: str, block: Tensor, dim: int, copies: int | None) -> Tensor:
    """A block whose axis `dim` is of the space, carried; `copies` is the axis of the spaces' copies, if it has any."""
    if isinstance(map, Index):
        return _act_index(map, role, block, dim, copies)
    if isinstance(map, Turn):
        return _act_turn(map, role, block, dim, copies)
    if role == "e" and isinstance(map, Plan):
        return _matmul(map.even, block, dim, copies)
    if role == "e":
        if not _constant(block, dim):
            raise ValueError(
                "norm gains that differ from unit to unit do not rotate: fold them into their readers first"
            )
        n, m = map.write.shape[-2:]
        return block if n == m else block.narrow(dim, 0, 1).repeat_interleave(n, dim)
    return _matmul(map.write if role == "w" else map.read.mT, block, dim, copies)


def _act_index(map: Index, role: str, block: Tensor, dim: int, copies: int | None) -> Tensor:
    index = map.index.to(block.device)
    known = index.clamp_min(0)
    if copies is None:
        out = block.index_select(dim, known)
    else:
        front = block.movedim((copies, dim), (0, 1))
        out = front[torch.arange(len(index), device=index.device)[:, None], known].movedim((0, 1), (copies, dim))
    share = shares(index)
    if share is not None:
        share = share if role == "r" else (share > 0).to(share)
        out = out * _along(share.to(block), out, dim, copies)
    if map.scale is None or role == "e":
        return out
    scale = _along(map.scale.to(block), out, dim, copies)
    return out * scale if role == "w" else out / scale


def _act_turn(map: Turn, role: str, block: Tensor, dim: int, copies: int | None) -> Tensor:
    x, y = map.turn.to(block.device).real, map.turn.to(block.device).imag
    if role == "r":  # one over the conjugate
        size = x * x + y * y
        x, y = x / size, y / size
    halves = block.unflatten(dim, (2, -1))
    real, imaginary = halves.unbind(dim)
    a, b = (_along(values.to(block.dtype), real, dim, copies) for values in (x, y))
    return torch.stack((a * real - b * imaginary, b * real + a * imaginary), dim).flatten(dim, dim + 1)


def _matmul(matrix: Tensor, block: Tensor, dim: int, copies: int | None) -> Tensor:
    matrix = matrix.to(block)
    if copies is None:
        return torch.tensordot(matrix, block, ([1], [dim])).movedim(0, dim)
    front = block.movedim((copies, dim), (0, 1))
    out = torch.bmm(matrix, front.flatten(2) if front.dim() > 2 else front[..., None])
    return out.view(matrix.shape[0], matrix.shape[1], *front.shape[2:]).movedim((0, 1), (copies, dim))


def _along(values: Tensor, block: Tensor, dim: int, copies: int | None) -> Tensor:
    """Values (n,) or (copies, n), shaped to multiply a block."""
    shape = [1] * block.dim()
    shape[dim] = values.shape[-1]
    if copies is None:
        return values.view(shape)
    shape[copies] = values.shape[0]
    return (values if copies < dim else values.mT).reshape(shape)


def _constant(block: Tensor, dim: int) -> bool:
    first = block.select(dim, 0).unsqueeze(dim)
    return bool(((block - first).abs() <= 1e-6 * first.abs()).all())


def shares(index: Tensor) -> Tensor | None:
    """One over how often each donor unit is taken, 0 where none is; None where each is taken at most once."""
    if not index.numel():
        return None
    rows = index.reshape(-1, index.shape[-1])
    counts = torch.zeros(len(rows), int(rows.max().clamp_min(0)) + 1, dtype=torch.float64, device=index.device)
    taken = (rows >= 0).double()
    counts.scatter_add_(1, rows.clamp_min(0), taken)
    if bool((counts <= 1).all()) and bool(taken.all()):
        return None
    return (taken / counts.gather(1, rows.clamp_min(0)).clamp_min(1)).view(index.shape)


def missing(map: Map) -> Tensor | None:
    """(n,) or (copies, n): the target units that no donor unit corresponds to; None where there is none."""
    if isinstance(map, Index):
        none = map.index < 0
    elif isinstance(map, Plan):
        none = map.even.sum(-1) == 0
    else:
        return None
    return none if bool(none.any()) else None


def coupled(coupling: Tensor, signs: Tensor | None = None) -> Plan:
    """The two maps of couplings (copies, n, m), target by donor: means for writers, shares for readers."""
    coupling = coupling.double()
    rows, columns = coupling.sum(-1, keepdim=True), coupling.sum(-2, keepdim=True)
    even = coupling / torch.where(rows > 0, rows, 1)
    read = (coupling / torch.where(columns > 0, columns, 1)).mT
    write = even
    if signs is not None:
        write, read = even * signs, read * signs.mT
    return Plan(write.contiguous(), read.contiguous(), even.contiguous())


def spread(map: Index, donors: int) -> Plan:
    """An index into `donors` units as the same map in matrices."""
    taken = torch.nn.functional.one_hot(map.index.clamp_min(0), donors).double() * (map.index >= 0)[..., None]
    plan = coupled(taken)
    if map.scale is None:
        return plan
    return Plan(plan.write * map.scale[..., None], plan.read / map.scale[..., None, :], plan.even)


def after(second: Map, first: Map) -> Map:
    """`first`, then `second`: one map that does both."""
    if isinstance(second, Index) and isinstance(first, Index):
        known = second.index.clamp_min(0)
        index = torch.where(second.index >= 0, first.index.gather(-1, known), -1)
        moved = None if first.scale is None else first.scale.gather(-1, known)
        if second.scale is None or moved is None:
            return Index(index, second.scale if moved is None else moved)
        return Index(index, second.scale * moved)
    if isinstance(second, Plan) and isinstance(first, Index):
        first = spread(first, first.index.shape[-1])
    elif isinstance(first, Plan) and isinstance(second, Index):
        second = spread(second, first.write.shape[-2])
    if isinstance(second, Plan) and isinstance(first, Plan):
        return Plan(second.write @ first.write, first.read @ second.read, second.even @ first.even)
    if isinstance(second, Matrix) and isinstance(first, Matrix):
        return Matrix(second.write @ first.write, first.read @ second.read)
    assert isinstance(second, Turn) and isinstance(first, Turn), "maps of one space are of one kind"
    return Turn(second.turn * first.turn)


def inverse(map: Map) -> Map:
    """The map back, of a map that has one."""
    if isinstance(map, Plan) or (isinstance(map, Matrix) and map.write.shape[-1] != map.write.shape[-2]):
        raise ValueError("a coupling, or a map between different widths, cannot be undone")
    if isinstance(map, Index) and (shares(map.index) is not None or int(map.index.max()) >= map.index.shape[-1]):
        raise ValueError("an index that leaves units out, or takes them twice, cannot be undone")
    if isinstance(map, Index):
        back = map.index.argsort(-1)
        return Index(back, None if map.scale is None else 1 / map.scale.gather(-1, back))
    if isinstance(map, Matrix):
        return Matrix(map.read, map.write)
    return Turn(1 / map.turn)


def reorder(map: Map, order: Tensor) -> Map:
    """The copies of a map in another order: copy i of the result is copy order[i]."""
    order = order.clamp_min(0)  # what is within a unit that has no counterpart plays no part
    if isinstance(map, Index):
        return Index(map.index[order], None if map.scale is None else map.scale[order])
    if isinstance(map, Plan):
        return Plan(map.write[order], map.read[order], map.even[order])
    if isinstance(map, Matrix):
        return Matrix(map.write[order], map.read[order])
    return Turn(map.turn[order])


def settle(map: Map, tolerance: float) -> Map:
    """The map with what is within rounding of the identity made the identity, which changes no bit of a tensor."""
    if isinstance(map, Index):
        if map.scale is None:
            return map
        scale = torch.where((map.scale.abs() - 1).abs() <= tolerance, map.scale.sign(), map.scale)
        return Index(map.index, None if bool((scale == 1).all()) else scale)
    if isinstance(map, Matrix) and (isinstance(map, Plan) or map.write.shape[-1] != map.write.shape[-2]):
        return map
    if isinstance(map, Matrix):
        eye = torch.eye(map.write.shape[-1], dtype=map.write.dtype).expand_as(map.write)
        near = ((map.write - eye).abs().amax((-2, -1), keepdim=True) <= tolerance).expand_as(eye)
        return Matrix(torch.where(near, eye, map.write), torch.where(near, eye, map.read))
    return Turn(torch.where((map.turn - 1).abs() <= tolerance, torch.ones_like(map.turn), map.turn))


def still(map: Map) -> bool:
    """Whether a map is the identity, exactly."""
    if isinstance(map, Index):
        own = torch.arange(map.index.shape[-1], device=map.index.device)
        return bool((map.index == own).all()) and (map.scale is None or bool((map.scale == 1).all()))
    if isinstance(map, Matrix):
        square = map.write.shape[-1] == map.write.shape[-2]
        eye = torch.eye(map.write.shape[-1], dtype=map.write.dtype)
        return square and bool((map.write == eye).all() and (map.read == eye).all())
    return bool((map.turn == 1).all())
