"""Frank-Wolfe over the maps of all networks at once (C2M3, Crisostomi et al. 2024, arXiv:2405.17897): maps leave their
group for its convex hull, where all of them can move together.

The hull of the permutations are the doubly stochastic matrices, that of the rotations the matrices of norm at most one;
the best point of a hull in a direction is an element of the group, an assignment or a Procrustes rotation. Along a line
the likeness of the networks is a polynomial, so that the best step has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from alignment._acts import Index, Map, Matrix, Plan
from alignment._groups import KINDS
from alignment.match.hungarian import hungarian
from alignment.match.procrustes import procrustes
from alignment.spaces import Space, Spaces

STALL = 1e-6  # of the likeness: a smaller gain is none
PATIENCE = 5  # steps without a gain after which it stops

Element = Mapping[str, Map]  # by space
Best = Callable[[Sequence[Element], Sequence[Space]], Sequence[Element]]
Likeness = Callable[[Sequence[Element]], float]


def movable(spaces: Spaces) -> list[Space]:
    """Spaces whose group has a hull, with nothing within them or around them."""
    return [
        space
        for space in spaces.spaces
        if KINDS.get(space.group) in (Index, Matrix) and space.within is None and not spaces.inner(space.name)
    ]


def held(spaces: Spaces) -> int:
    """The bytes that the matrices of one network's hulls take."""
    return sum(2 * 8 * space.size**2 for space in movable(spaces))


def climb(spaces: Spaces, start: Sequence[Element], best: Best, likeness: Likeness, steps: int) -> list[dict[str, Map]]:
    """The maps of all networks after at most `steps` steps, those of each space rounded to the nearest group element.

    `best` gives for all networks the group elements of these spaces in whose direction the likeness grows most.
    """
    free = movable(spaces)
    names = {space.name for space in free}
    degree = 2 * max([sum(axis.space in names for axis in part.axes) for part in spaces.parts], default=0)
    at = [{**maps, **_all(maps, free)} for maps in start]
    value, stalled = likeness(at), 0
    for _ in range(steps if degree else 0):
        goal = [_all(maps, free) for maps in best(at, free)]
        along = [likeness(_between(at, goal, step / degree)) for step in range(1, degree + 1)]
        share, found = _top([value, *along])
        if share == 0:
            break
        at = _between(at, goal, share)
        stalled = stalled + 1 if found - value <= STALL * abs(value) else 0
        value = found
        if stalled == PATIENCE:
            break
    return [{**maps, **{space.name: nearest(space, maps[space.name]) for space in free}} for maps in at]


def _all(maps: Element, free: Sequence[Space]) -> dict[str, Map]:
    return {space.name: dense(maps.get(space.name, Index(torch.arange(space.size)))) for space in free}


def dense(map: Map) -> Matrix:
    """A group element as matrices that may be mixed with others."""
    if isinstance(map, Matrix):
        return map
    assert isinstance(map, Index), "only permutations and rotations have a hull here"
    even = torch.nn.functional.one_hot(map.index).double()
    write = even if map.scale is None else even * map.scale[:, None]
    return Plan(write, write.mT, even)


def nearest(space: Space, map: Map) -> Map:
    """The element of a space's group nearest to a matrix of its hull."""
    assert isinstance(map, Matrix)
    if not isinstance(map, Plan):
        q = procrustes(map.write, fixing_ones=space.group == "orthogonal fixing ones")
        return Matrix(q, q.mT)
    index = hungarian(map.write.abs())
    if space.group in ("permutation", "positive permutation"):
        return Index(index)
    sign = map.write.gather(1, index[:, None])[:, 0].sign()
    return Index(index, torch.where(sign == 0, 1, sign))


def _between(at: Sequence[Element], goal: Sequence[Element], share: float) -> list[dict[str, Map]]:
    return [{**a, **{name: _mixed(a[name], b[name], share) for name in b}} for a, b in zip(at, goal)]


def _mixed(one: Map, other: Map, share: float) -> Matrix:
    assert isinstance(one, Matrix) and isinstance(other, Matrix)
    write = torch.lerp(one.write, other.write, share)
    if isinstance(one, Plan) and isinstance(other, Plan):
        return Plan(write, write.mT, torch.lerp(one.even, other.even, share))
    return Matrix(write, write.mT)


def _top(values: Sequence[float]) -> tuple[float, float]:
    """Where in 0 to 1 the polynomial through values at even distances is largest, and that value."""
    degree = len(values) - 1
    fit = np.polynomial.Polynomial.fit(np.linspace(0, 1, degree + 1), values, degree, domain=[0, 1])
    roots: list[complex] = np.asarray(fit.deriv().roots(), complex).tolist()
    inside = [root.real for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1]
    share = max([0.0, 1.0, *inside], key=lambda one: float(fit(one)))
    return share, float(fit(share))
