"""ZipIt: the most similar units of several networks, or of one, become one unit (Stoica et al. 2023, arXiv:2305.03053).

The published loop looks for the largest of all similarities and copies the whole table at every step, O(n^3). Here each
unit keeps its best neighbour in a heap, a merge changes one row and one column in place, and a unit whose neighbour
changed is looked at again only when it comes up: O(n^2) in all but rare cases, and the same merges.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment._acts import Map, Plan
from alignment.maps import Maps
from alignment.spaces import Spaces

__all__ = ["zip_networks", "zip_units"]


def zip_units(
    similarity: Tensor,  # (n, n) of all networks' units one after the other, symmetric, larger is better
    sizes: Sequence[int],
    until: int | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> Tensor:
    """int64 (n,): the merged unit of each unit, numbered by first units; `until` are left, by default a network's.

    A merged unit is as similar to another as the less similar of its two was, times `alpha`; with 0 it merges no more.
    Of the units that go, each network may lose `beta` of its share to merges within itself. Equal similarities go to
    the lowest numbers. Of three networks or more the published loop may come to an end with units that must not merge
    (an a with a b, a b with a c, a c with an a); then, from the start again, no more than `until` merged units are
    begun, and all others join these. Raises ValueError for numbers out of range, where similarities are not finite or
    not symmetric, and where all that is left must not merge.
    """
    import numpy as np

    n, models = len(similarity), len(sizes)
    until = n // models if until is None else until
    if similarity.shape != (n, n) or sum(sizes) != n:
        raise ValueError(f"zip: similarities {tuple(similarity.shape)} do not fit networks of {list(sizes)} units")
    if not 1 <= until <= n or not 0 <= alpha <= 1 or not 0 <= beta <= 1:
        raise ValueError(f"zip: until is in 1 to {n}, alpha and beta in 0 to 1; given: {until}, {alpha}, {beta}")
    if not bool(torch.isfinite(similarity.sum(dtype=torch.float64))):
        raise ValueError("zip: a similarity of units is not finite")
    table = similarity.detach().cpu().to(torch.float32, copy=True).numpy()
    if not np.allclose(table, table.T, rtol=1e-3, atol=1e-5):
        raise ValueError("zip: the similarities of units are not symmetric")
    np.minimum(table, table.T, out=table)  # rounding, which would tell a pair from itself
    np.fill_diagonal(table, -np.inf)
    origin = np.repeat(np.arange(models), sizes)
    budget = np.full(models, int((n - until) // models * beta + 1e-4))
    into = _merged(table.copy(), origin, budget.copy(), until, alpha, n)
    if len(set(into.tolist())) > until:
        into = _merged(table, origin, budget, until, alpha, until)
    left = len(set(into.tolist()))
    if left > until:
        raise ValueError(
            f"zip: {left} units are left in place of {until}, and none of them may merge; raise alpha or beta"
        )
    return torch.from_numpy(np.unique(into, return_inverse=True)[1].astype(np.int64))


def _merged(table: Any, origin: Any, budget: Any, until: int, alpha: float, groups: int) -> Any:  # (n, n), (n,), (k,)
    """Greedily the unit that each unit went into (n,), when `until` are left or none of those left may merge; once
    there are as many `groups` of units, neither do these merge nor do other units but with these."""
    import numpy as np

    for model in range(len(budget)):
        if budget[model] <= 0:
            _part(table, origin == model)
    n = left = len(table)
    into = np.arange(n)
    alive, alone = np.ones(n, bool), np.ones(n, bool)
    begun = 0
    best = table.argmax(1)
    value = table[into, best]
    heap = [(-v, i) for i, v in enumerate(value.tolist())]
    heapq.heapify(heap)

    def look(row: int) -> None:
        seen = table[row] if begun < groups else np.where(alone == alone[row], -np.inf, table[row])
        best[row] = seen.argmax()
        value[row] = seen[best[row]]
        heapq.heappush(heap, (-float(value[row]), row))

    while left > until and heap and heap[0][0] < np.inf:
        found, row = heapq.heappop(heap)
        if not alive[row] or -found != value[row]:
            continue
        column = int(best[row])
        if not alive[column] or table[row, column] != value[row] or (begun >= groups and alone[row] == alone[column]):
            look(row)  # its neighbour changed since
            continue
        row, column = min(row, column), max(row, column)
        new = np.minimum(table[row], table[column])
        new = new * np.float32(alpha) if alpha > 0 else np.full_like(new, -np.inf)
        new[~alive] = new[row] = new[column] = -np.inf
        table[row], table[:, row] = new, new
        table[column], table[:, column] = -np.inf, -np.inf
        alive[column], into[column] = False, row
        left -= 1
        begun += 1 - int(not alone[row]) - int(not alone[column])
        alone[row] = alone[column] = False
        better = (new > value) | ((new == value) & (row < best) & (new > -np.inf))
        for other in np.nonzero(better & alone if begun >= groups else better)[0].tolist():
            if other != row:  # below 0 a factor makes units more similar
                value[other], best[other] = new[other], row
                heapq.heappush(heap, (-float(value[other]), other))
        if origin[row] == origin[column]:
            budget[origin[row]] -= 1
            if budget[origin[row]] == 0:
                _part(table, (origin == origin[row]) & alive)
        look(row)
    for unit in range(n):  # a unit's number is no lower than that of the one it went into
        into[unit] = into[into[unit]]
    return into


def _part(table: Any, units: Any) -> None:
    """No two of these units may merge."""
    import numpy as np

    number = np.nonzero(units)[0]
    table[np.ix_(number, number)] = -np.inf


def zip_networks(
    spaces: Spaces,
    networks: Sequence[Mapping[str, Tensor]],
    similarities: Mapping[str, Tensor],  # by space (k n, k n)
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> dict[str, Tensor]:
    """The k networks of one table zipped into one of their size.

    Spaces without similarities stay as they are, so they must correspond. Raises ValueError for a space whose units do
    not change places, lie within others or hold spaces of their own.
    """
    groups = {}
    for name, similarity in similarities.items():
        if name not in zippable(spaces):
            raise ValueError(f"zip: '{name}' is no space of this network whose units change places and hold no others")
        size = spaces.by_name[name].size
        groups[name] = zip_units(similarity, [size] * len(networks), size, alpha=alpha, beta=beta)
    return joined(spaces, networks, groups)


def zippable(spaces: Spaces) -> list[str]:
    """Spaces within no other whose units change places and hold no spaces of their own."""
    return [
        space.name
        for space in spaces.spaces
        if space.within is None and space.group.endswith("permutation") and not spaces.inner(space.name)
    ]


def joined(
    spaces: Spaces,
    networks: Sequence[Mapping[str, Tensor]],
    groups: Mapping[str, Tensor],  # by space int64 (k n): the merged unit of each network's units, one after the other
    *,
    weights: Sequence[float] | None = None,
    into: Spaces | None = None,
    signs: Mapping[str, Tensor] | None = None,  # by space (k n) of 1 and -1: units that join with their sign changed
) -> dict[str, Tensor]:
    """One network of k, in the table `into` where spaces have other sizes there.

    A merged unit is the mean of its units and is read as each of them was; units alone stay what they are. What no
    space moves is averaged, by `weights` that sum to 1 (equal ones by default).
    """
    into = spaces if into is None else into
    shares = torch.tensor(
        [1 / len(networks)] * len(networks) if weights is None else list(weights), dtype=torch.float64
    )
    made: list[dict[str, Map]] = [{} for _ in networks]
    for name, unit in groups.items():
        size = spaces.by_name[name].size
        evens = placed(unit, size, into.by_name[name].size, shares)
        sign = torch.ones(len(unit)) if signs is None or name not in signs else signs[name]
        for maps, even, own in zip(made, evens, sign.double().split(size)):
            maps[name] = Plan(even * own, (even.mT > 0) * own[:, None], even)
    nothing = _zeros(into, networks[0])  # for units of others alone
    out: dict[str, Tensor] = {}
    for share, maps, one in zip(shares.tolist(), made, networks):
        for name, tensor in Maps(spaces, into, maps).carry(one, nothing).items():
            if tensor.is_floating_point():
                out[name] = tensor.double() * share + (out[name] if name in out else 0)
            else:
                out.setdefault(name, tensor)
    return {name: tensor.to(networks[0][name].dtype) for name, tensor in out.items()}


def placed(groups: Tensor, size: int, merged: int, weights: Tensor) -> list[Tensor]:  # (k n)
    """For each network (merged, n) float64, whose weighted mean over networks makes merged units the weighted means of
    their units."""
    member = torch.nn.functional.one_hot(groups, merged).double()
    mass = (member * weights.double().repeat_interleave(size)[:, None]).sum(0)
    return [part.mT.contiguous() for part in (member / mass).split(size)]


def _zeros(spaces: Spaces, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of a table that computes nothing; lengths that the table leaves open are those of `like`."""
    shapes = {name: part.shape for part in spaces.of(like).parts for name in part.names if name in like}
    return {
        name: tensor.new_zeros(
            [own if size == -1 else size for size, own in zip(shapes.get(name, tensor.shape), tensor.shape)]
        )
        for name, tensor in like.items()
    }
