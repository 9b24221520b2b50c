"""Networks of different depth: which layer of a donor is which of a target.

Layers keep their order and correspond one to one; who has no counterpart is left out at a price. How alike two layers
are is linear CKA (Kornblith et al. 2019, arXiv:1905.00414) of the states after them on the same tokens, from sums over
batches that do not grow with the data and are not biased by a batch's size (Nguyen et al. 2021, arXiv:2010.15327).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignment._sizes import INSIDE
from alignment.spaces import Spaces

__all__ = ["LinearCKA", "layer_types", "match_layers", "types_of_both"]


def match_layers(
    similarity: Tensor,  # (L, M), target by donor
    *,
    gap: float = 0.0,
    least: float = 0.0,
    types: tuple[Sequence[str], Sequence[str]] | None = None,
) -> dict[int, int]:
    """The donor's layer of each target layer that has one: in order, of largest total similarity less gaps.

    `gap` is the cost of each layer of either network without counterpart; pairs less alike than `least`, or of other
    `types` (one for each layer of target and donor), never correspond. O(L M). Raises ValueError where a similarity is
    not finite and where `types` do not fit.
    """
    rows, columns = similarity.shape
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("a similarity of layers is not finite")
    if types is not None and (len(types[0]), len(types[1])) != (rows, columns):
        raise ValueError(
            f"types of {len(types[0])} and {len(types[1])} layers do not fit similarities {rows}x{columns}"
        )
    table: list[list[float]] = similarity.double().tolist()
    best = [[-gap * (i + j) for j in range(columns + 1)] for i in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            best[i][j] = max(best[i - 1][j] - gap, best[i][j - 1] - gap)
            if _may(table, types, least, i - 1, j - 1):
                best[i][j] = max(best[i][j], best[i - 1][j - 1] + table[i - 1][j - 1])
    found: dict[int, int] = {}
    i, j = rows, columns
    while i and j:
        pair = best[i - 1][j - 1] + table[i - 1][j - 1]
        if _may(table, types, least, i - 1, j - 1) and best[i][j] == pair:
            i, j = i - 1, j - 1
            found[i] = j
        elif best[i][j] == best[i - 1][j] - gap:
            i -= 1
        else:
            j -= 1
    return dict(sorted(found.items()))


def _may(
    table: list[list[float]], types: tuple[Sequence[str], Sequence[str]] | None, least: float, i: int, j: int
) -> bool:
    return table[i][j] >= least and (types is None or types[0][i] == types[1][j])


def layer_types(spaces: Spaces, told: bool = True) -> list[str]:
    """For each layer what must agree: its spaces with their groups (dense or experts), queries and keys aside, which a
    layer can do without; and, if `told`, the config's layer_types (local or global attention)."""
    kinds = _told(spaces) if told else []
    layers: dict[int, list[str]] = {}
    for space in spaces.spaces:
        words = space.name.split(".")
        if words[0] == "layers":
            own = layers.setdefault(int(words[1]), [])
            if words[-1] not in INSIDE:
                own.append(f"{words[2]}: {space.group}")
    found = []
    for number in sorted(layers):
        own = [kinds[number]] if number < len(kinds) else []
        found.append("; ".join([*own, *layers[number]]))
    return found


def types_of_both(target: Spaces, donor: Spaces) -> tuple[list[str], list[str]]:
    """For each layer of target and donor what must agree; the kinds of attention only where both have several."""
    told = all(len(set(_told(one))) > 1 for one in (target, donor))
    return layer_types(target, told), layer_types(donor, told)


def _told(spaces: Spaces) -> list[str]:
    kinds: list[str] = (json.loads(spaces.config) if spaces.config else {}).get("layer_types") or []
    return kinds


@dataclass
class LinearCKA:
    """Sums for the likeness of every layer of a target with every layer of a donor."""

    cross: Tensor | None = None  # (L, M)
    own: list[Tensor] = field(default_factory=list)  # (L,), (M,)

    def add(self, target: Sequence[Tensor], donor: Sequence[Tensor]) -> None:
        """States (n, d) after each layer, of the same n tokens; ValueError for fewer than four."""
        if len(target[0]) < 4:
            raise ValueError("layers are compared on batches of at least four tokens")
        one, other = (torch.stack([_centred(states) for states in side]) for side in (target, donor))
        cross = torch.einsum("lab,mab->lm", one, other)
        own = [side.square().sum((1, 2)) for side in (one, other)]
        if self.cross is None:
            self.cross, self.own = cross, own
        else:
            self.cross, self.own = self.cross + cross, [total + new for total, new in zip(self.own, own)]

    def similarity(self) -> Tensor:
        """(L, M), at most 1; about 0, and possibly below, for states that have nothing to do with each other."""
        assert self.cross is not None, "no states were added"
        sizes = (self.own[0][:, None] * self.own[1]).sqrt()
        return self.cross / sizes.clamp_min(torch.finfo(torch.float64).tiny)


def _centred(states: Tensor) -> Tensor:
    """(n, n) inner products of states, centred without their diagonal (Székely and Rizzo 2014, arXiv:1310.2926)."""
    states = states.double()
    n = len(states)
    gram = states @ states.mT
    gram.fill_diagonal_(0)
    rows = gram.sum(1) / (n - 2)
    gram = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)
