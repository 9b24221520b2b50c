"""What the rules of `alignment.trace` work on: tensors as axes of units, and the stored tensors they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alignment._units import Dim, Unit, find, freeze, join, limit, resolve, size, units
from alignment.spaces import Axis, Part, Space, Spaces


@dataclass(eq=False)
class Piece:
    """Rows `start` to `start + shape[0]` of a stored tensor: its axes, and the role it has on each."""

    name: str
    whole: tuple[int, ...]
    start: int
    shape: tuple[int, ...]
    dims: list[Dim]
    roles: list[str]
    said: set[int] = field(default_factory=set)  # the axes whose role is known

    def role(self, dim: int, role: str) -> None:
        """Its role on an axis; one that has two there (tied tensors) passes neither scales nor signs."""
        if dim in self.said and self.roles[dim] != role:
            limit([self.dims[dim]])
        self.roles[dim] = role
        self.said.add(dim)

    def hold(self, dim: int, units: Dim, role: str) -> None:
        """What its axis holds, as it turns out where the tensor is used."""
        if dim in self.said:
            join(self.dims[dim], units)
        else:
            self.dims[dim] = units
        self.role(dim, role)


@dataclass
class Layout:
    """A tensor on the way through a network; `piece` where it is a stored one."""

    shape: tuple[int, ...]
    dims: list[Dim]
    piece: Piece | None = None

    def take(self, dims: Sequence[Dim], shape: Sequence[int] | None = None) -> Layout:
        return Layout(tuple(self.shape if shape is None else shape), list(dims))


def still(shape: Sequence[int]) -> Layout:
    """A tensor nothing of which moves."""
    return Layout(tuple(shape), [[(count,)] for count in shape])


@dataclass
class Stored:
    """All tensors of a network, by name, with the pieces that were met."""

    tensors: Mapping[str, Tensor]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self.origin = {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    def unit(self, name: str, size: int, **fields: Any) -> Unit:
        self.count += 1
        return Unit(name, size, (self.count,), **fields)

    def get(self, name: str) -> Layout:
        """A stored tensor whose rows write units, and whose other axes hold units of their own."""
        name = self.origin[name]
        shape = tuple(self.tensors[name].shape)
        if name not in self.pieces:
            stem = name.removesuffix(".weight")
            dims: list[Dim] = [
                [(self.unit(stem if number == 0 else f"{stem}.{number}", count),)] for number, count in enumerate(shape)
            ]
            self.pieces[name] = [Piece(name, shape, 0, shape, dims, ["w"] * len(shape))]
        assert len(self.pieces[name]) == 1, "a tensor that was cut is met again whole"
        piece = self.pieces[name][0]
        return Layout(shape, piece.dims, piece)

    def cut(self, name: str, dims: Sequence[list[Dim]], roles: Sequence[list[str]]) -> None:
        """A stored tensor as pieces one after the other on its first axis."""
        assert self.origin[name] == name and name not in self.pieces
        shape, at = tuple(self.tensors[name].shape), 0
        self.pieces[name] = []
        for one, role in zip(dims, roles):
            count = sum(map(size, resolve(one[0])))
            self.pieces[name].append(Piece(name, shape, at, (count, *shape[1:]), one, role, set(range(len(one)))))
            at += count

    def spaces(self, family: str, passed: Sequence[str]) -> Spaces:
        """The table: a space for all units that are still apart, a part for every stretch of a tensor."""
        for name in self.tensors:
            if self.origin[name] == name and name not in self.pieces and not name.endswith(tuple(passed)):
                freeze(*self.get(name).dims)
        every = [piece for pieces in self.pieces.values() for piece in pieces]
        while not self._settled(every):
            pass
        found = sorted({unit for piece in every for unit in units(piece.dims)}, key=lambda unit: unit.order)
        listed: list[Unit] = []
        for unit in found:
            if unit not in listed and unit.within is None:
                listed += [unit, *(other for other in found if other.within and find(other.within) is unit)]
        parts = [
            part
            for pieces in self.pieces.values()
            for number, piece in enumerate(pieces)
            for part in _parts(piece, f"[{number}]" if len(pieces) > 1 else "")
        ]
        ties = tuple((name, origin) for name, origin in self.origin.items() if name != origin)
        return Spaces(family, tuple(_space(unit) for unit in listed), tuple(parts), (), ties, tuple(passed))

    def _settled(self, pieces: list[Piece]) -> bool:
        """Fixes what no part of a table can say; true where nothing was left to fix."""
        settled = True
        for piece in pieces:
            for segments in _combinations([resolve(dim) for dim in piece.dims]):
                having = [factor for segment in segments for factor in segment if isinstance(factor, Unit)]
                for unit in having:
                    outer = unit.within and find(unit.within)
                    nested = outer is not None or any(other.within and find(other.within) is unit for other in having)
                    twice = nested and having.count(unit) > 1  # the copies would lie on two axes
                    if twice or (outer is not None and (outer.fixed or outer not in having)):
                        freeze([(unit,)])
                        settled = False
        return settled


def _space(unit: Unit) -> Space:
    if unit.group:
        group = unit.group
    elif unit.scales:
        group = "scaled permutation" if unit.signs else "positive permutation"
    else:
        group = "signed permutation" if unit.signs else "permutation"
    return Space(unit.name, unit.size, group, None if unit.within is None else find(unit.within).name)


def _combinations(dims: Sequence[Dim]) -> list[tuple[tuple[Unit | int, ...], ...]]:
    out: list[tuple[tuple[Unit | int, ...], ...]] = [()]
    for dim in dims:
        out = [(*head, segment) for head in out for segment in dim]
    return out


def _parts(piece: Piece, suffix: str) -> list[Part]:
    dims = [resolve(dim) for dim in piece.dims]
    places: list[tuple[int, ...]] = [()]
    for dim in dims:
        places = [(*head, number) for head in places for number in range(len(dim))]
    found = []
    for place in places:
        take, axes = [], []
        for number, (dim, at) in enumerate(zip(dims, place)):
            start = sum(map(size, dim[:at])) + (piece.start if number == 0 else 0)
            if size(dim[at]) != piece.whole[number]:
                take.append((number, start, size(dim[at])))
            for factor in dim[at]:
                if isinstance(factor, Unit):
                    axes.append(Axis(factor.size, factor.name, piece.roles[number]))
                else:
                    axes.append(Axis(factor))
        key = piece.name + suffix + (f"[{','.join(map(str, place))}]" if len(places) > 1 else "")
        found.append(Part(key, (piece.name,), piece.whole, piece.whole, tuple(take), tuple(axes)))
    return found
