"""Axes of tensors while a network is followed: which units lie on each, and what is found out about them on the way.

An axis is a concatenation of segments, a segment a product of factors (the last one fastest), a factor some units or
the length of what does not move. Adding two tensors joins the units of their axes. What must be told apart later,
because a network concatenates, groups or reshapes, is cut or factored then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Unit:
    """Units of one space, as far as is known: joined ones link to the earliest, cut ones have pieces."""

    name: str
    size: int
    order: tuple[int, ...]  # the earliest names the space
    within: Unit | None = None
    group: str = ""  # where it is none of the permutations
    scales: bool = True  # positive scales pass all that is between writers and readers
    signs: bool = True
    fixed: bool = False
    link: Unit | None = None
    pieces: tuple[Unit, ...] = ()
    product: bool = False  # pieces are (outer, inner) and not one after the other


Segment = tuple["Unit | int", ...]
Dim = list[Segment]


def find(unit: Unit) -> Unit:
    """What a unit was joined to."""
    while unit.link is not None:
        unit = unit.link
    return unit


def length(factor: Unit | int) -> int:
    return factor if isinstance(factor, int) else factor.size


def size(segment: Segment) -> int:
    return math.prod(length(factor) for factor in segment)


def resolve(dim: Dim) -> Dim:
    """The axis in units that were neither joined nor cut; what is fixed is a length, and a length of 1 is nothing."""
    out: Dim = []
    for segment in dim:
        heads: Dim = [()]
        for factor in segment:
            opened = _open(factor)
            if len(opened) > 1 and any(size(head) > 1 for head in heads):
                freeze([(factor,)])  # pieces of what changes faster than something else are no stretch of the axis
                opened = [(length(factor),)]
            heads = [_merged(head + one) for head in heads for one in opened]
        out += heads
    return out


def _open(factor: Unit | int) -> Dim:
    if isinstance(factor, int):
        return [()] if factor == 1 else [(factor,)]
    unit = find(factor)
    if unit.size == 1:
        return [()]
    if unit.product:
        return resolve([unit.pieces])
    if unit.pieces:
        return [one for piece in unit.pieces for one in _open(piece)]
    return [(unit.size,)] if unit.fixed else [(unit,)]


def _merged(segment: Segment) -> Segment:
    out: list[Unit | int] = []
    for factor in segment:
        if out and isinstance(factor, int) and isinstance(out[-1], int):
            out[-1] *= factor
        else:
            out.append(factor)
    return tuple(out)


def units(dims: Iterable[Dim]) -> list[Unit]:
    """All units that still move."""
    found = (factor for dim in dims for segment in resolve(dim) for factor in segment)
    return [factor for factor in found if isinstance(factor, Unit)]


def freeze(*dims: Dim) -> None:
    """Nothing on these axes moves."""
    for dim in dims:
        for segment in dim:
            for factor in segment:
                if isinstance(factor, Unit):
                    unit = find(factor)
                    freeze([(piece,) for piece in unit.pieces])
                    unit.fixed = True


def limit(dims: Iterable[Dim], scales: bool = False, signs: bool = False) -> None:
    """What units met: whether scales and signs pass it."""
    for unit in units(dims):
        unit.scales, unit.signs = unit.scales and scales, unit.signs and signs


def factor(unit: Unit, outer: int) -> tuple[Unit, Unit]:
    """Units told apart in `outer` groups, which change places whole, and those within each."""
    unit = find(unit)
    assert not unit.pieces and unit.size % outer == 0
    first = Unit(f"{unit.name}.groups", outer, (*unit.order, 0), unit.within, "", False, False, unit.fixed)
    inner = (first, "", unit.scales, unit.signs, unit.fixed)
    unit.pieces = (first, Unit(f"{unit.name}.units", unit.size // outer, (*unit.order, 1), *inner))
    unit.product = True
    if unit.within is not None:  # spaces lie within spaces, and no deeper
        freeze([(unit,)])
    return unit.pieces[0], unit.pieces[1]


def cut(segment: Segment, at: int) -> tuple[Segment, Segment] | None:
    """A segment as two; None where it ends in the middle of what lies within a unit."""
    first, rest = segment[0], segment[1:]
    inside = size(rest)
    if at % inside:
        return None
    at //= inside
    if isinstance(first, int):
        return _merged((at, *rest)), _merged((first - at, *rest))
    unit = find(first)
    if unit.group:
        return None
    shared = (unit.within, unit.group, unit.scales, unit.signs, unit.fixed)
    unit.pieces = tuple(
        Unit(f"{unit.name}.{n}", count, (*unit.order, n), *shared) for n, count in enumerate((at, unit.size - at))
    )
    return (unit.pieces[0], *rest), (unit.pieces[1], *rest)


def narrow(dim: Dim, start: int, count: int) -> Dim:
    """`count` entries of an axis from `start` on."""
    out: Dim = []
    at = 0
    for segment in resolve(dim):
        low, high = max(start, at), min(start + count, at + size(segment))
        begin, at = at, at + size(segment)
        if low >= high:
            continue
        for edge in (high, low):  # the end first, so that the start's place stays
            if begin < edge < begin + size(segment):
                halves = cut(segment, edge - begin)
                if halves is None:
                    freeze([segment])
                    halves = ((edge - begin,), (begin + size(segment) - edge,))
                segment, begin = (halves[0], begin) if edge == high else (halves[1], edge)
        out.append(segment)
    return out


def join(one: Dim, other: Dim) -> Dim:
    """Two axes of one length made the same: units that lie at the same places are the same from now on."""
    left, right = resolve(one), resolve(other)
    assert sum(map(size, left)) == sum(map(size, right)), "axes of different lengths are joined"
    while left and right:
        left[:1], right[:1] = resolve(left[:1]), resolve(right[:1])
        n, m = size(left[0]), size(right[0])
        if n == m:
            _join_segments(left.pop(0), right.pop(0))
            continue
        longer = left if n > m else right
        halves = cut(longer[0], min(n, m))
        if halves is None:
            freeze(one, other)
            break
        longer[:1] = halves
    return resolve(one)


def _join_segments(one: Segment, other: Segment) -> None:
    left, right = list(one), list(other)
    while left and right:
        first, second = left.pop(0), right.pop(0)
        n, m = length(first), length(second)
        if n == m:
            _unite(first, second)
            continue
        (large, rest), small = ((first, left), second) if n > m else ((second, right), first)
        count = length(small)
        if length(large) % count or (isinstance(large, Unit) and find(large).group):
            freeze([one], [other])
            return
        if isinstance(large, int):
            rest.insert(0, large // count)
            _unite(count, small)
        else:
            outer, inner = factor(large, count)
            rest.insert(0, inner)
            _unite(outer, small)


def _unite(one: Unit | int, other: Unit | int) -> None:
    if isinstance(one, int) or isinstance(other, int):
        freeze([(one,)], [(other,)])
        return
    one, other = find(one), find(other)
    if one is other:
        return
    outer = one.within and find(one.within), other.within and find(other.within)
    first, second = (one, other) if one.order <= other.order else (other, one)
    if outer[0] is not outer[1] or one.group != other.group:
        freeze([(one,)], [(other,)])
    first.scales, first.signs = first.scales and second.scales, first.signs and second.signs
    first.fixed = first.fixed or second.fixed
    second.link = first


def regroup(dims: Sequence[Dim], shape: Sequence[int], into: Sequence[int]) -> list[Dim]:
    """Axes of a tensor of `shape` after it is seen as `into`, entries in the same order."""
    out: list[Dim] = []
    i = j = 0
    while i < len(shape) or j < len(into):
        first, last, n, m = i, j, 1, 1
        while i == first or j == last or n != m:
            if (n <= m and i < len(shape)) or j == len(into):
                if i == len(shape):
                    break
                n, i = n * shape[i], i + 1
            else:
                m, j = m * into[j], j + 1
        out += _split(_flat(dims[first:i]), into[last:j])
    return out


def _flat(dims: Sequence[Dim]) -> Dim:
    whole: Dim = [()]
    for dim in dims:
        dim = resolve(dim)
        if len(dim) > 1 and any(size(segment) > 1 for segment in whole):
            freeze(dim)
            dim = [(sum(map(size, dim)),)]
        whole = [_merged(head + segment) for head in whole for segment in dim]
    return whole


def _split(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    long = [n for n, count in enumerate(sizes) if count > 1]
    if len(long) <= 1:
        return [dim if n in long else [()] for n in range(len(sizes))]
    if len(dim) > 1:
        freeze(dim)
        return [[(count,)] for count in sizes]
    left, out = list(dim[0]), []
    for count in sizes:
        taken: list[Unit | int] = []
        while size(tuple(taken)) < count:
            first, still = left.pop(0), count // size(tuple(taken))
            if length(first) <= still and still % length(first) == 0:
                taken.append(first)
            elif length(first) % still or (isinstance(first, Unit) and find(first).group):
                freeze(dim)
                return [[(count,)] for count in sizes]
            elif isinstance(first, int):
                taken.append(still)
                left.insert(0, first // still)
            else:
                outer, inner = factor(first, still)
                taken.append(outer)
                left.insert(0, inner)
        out.append([tuple(taken)])
    return out
