"""ZipIt: the most similar units of several networks, or of one, become one unit (Stoica et al. 2023, arXiv:2305.03053).

The published loop looks for the largest of all similarities and copies the whole table at every step, O(n^3). Here each
unit keeps its best neighbour in a heap, a merge changes one row and one column in place, and a unit whose neighbour
changed is looked at again only when it comes up: O(n^2) in all but rare cases, and the same merges.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

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
    the lowest numbers. Raises ValueError for numbers out of range, where similarities are not finite or not symmetric,
    and where all that is left must not merge.
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
    for model in range(models):
        if budget[model] <= 0:
            _part(table, origin == model)
    into = np.arange(n)
    alive = np.ones(n, bool)
    best = table.argmax(1)
    value = table[np.arange(n), best]
    heap = [(-v, i) for i, v in enumerate(value.tolist())]
    heapq.heapify(heap)
    left = n
    while left > until:
        if not heap or heap[0][0] == np.inf:
            raise ValueError(f"zip: {left} units are left and none of them may merge; raise until, alpha or beta")
        found, row = heapq.heappop(heap)
        if not alive[row] or -found != value[row]:
            continue
        column = int(best[row])
        if not alive[column] or table[row, column] != value[row]:  # its neighbour changed since
            best[row] = table[row].argmax()
            value[row] = table[row, best[row]]
            heapq.heappush(heap, (-float(value[row]), row))
            continue
        row, column = min(row, column), max(row, column)
        new = np.minimum(table[row], table[column])
        new = new * np.float32(alpha) if alpha > 0 else np.full_like(new, -np.inf)
        new[~alive] = new[row] = new[column] = -np.inf
        table[row], table[:, row] = new, new
        table[column], table[:, column] = -np.inf, -np.inf
        alive[column], into[column] = False, row
        left -= 1
        better = np.nonzero((new > value) | ((new == value) & (row < best) & (new > -np.inf)))[0]
        for other in better.tolist():  # below 0 a factor makes units more similar
            if other != row:
                value[other], best[other] = new[other], row
                heapq.heappush(heap, (-float(value[other]), other))
        if origin[row] == origin[column]:
            budget[origin[row]] -= 1
            if budget[origin[row]] == 0:
                _part(table, (origin == origin[row]) & alive)
        best[row] = table[row].argmax()
        value[row] = table[row, best[row]]
        heapq.heappush(heap, (-float(value[row]), row))
    for unit in range(n):  # a unit's number is no lower than that of the one it went into
        into[unit] = into[into[unit]]
    return torch.from_numpy(np.unique(into, return_inverse=True)[1].astype(np.int64))


def _part(table: object, units: object) -> None:
    """No two of these units may merge."""
    import numpy as np

    assert isinstance(table, np.ndarray) and isinstance(units, np.ndarray)
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

    A merged unit is the mean of its units and is read as each of them was; what no space moves is averaged. Spaces
    without similarities stay as they are, so they must correspond. Raises ValueError for a space whose units do not
    change places, lie within others or hold spaces of their own.
    """
    models = len(networks)
    made: list[dict[str, Map]] = [{} for _ in networks]
    for name, similarity in similarities.items():
        space = spaces.by_name.get(name)
        if space is None or space.within is not None or not space.group.endswith("permutation"):
            raise ValueError(f"zip: '{name}' is no space of this network whose units change places")
        if spaces.inner(name):
            raise ValueError(f"zip: units of '{name}' hold spaces of their own and are not zipped")
        groups = zip_units(similarity, [space.size] * models, space.size, alpha=alpha, beta=beta)
        member = torch.nn.functional.one_hot(groups, space.size).double()  # (k n, n)
        share = models * (member / member.sum(0)).mT  # of which the mean over networks is a mean over units
        for number, maps in enumerate(made):
            own = slice(number * space.size, (number + 1) * space.size)
            write = share[:, own].contiguous()
            maps[name] = Plan(write, member[own].contiguous(), write)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in networks[0].items()}  # for units of others alone
    carried = [Maps(spaces, spaces, maps).carry(one, nothing) for maps, one in zip(made, networks)]
    out = {}
    for name, first in carried[0].items():
        total = torch.stack([one[name].double() for one in carried]).mean(0)
        out[name] = total.to(first) if first.is_floating_point() else first
    return out
