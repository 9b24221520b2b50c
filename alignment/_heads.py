"""Which head is which, and which expert: by what does not change when units inside them do.

Heads are compared before anything inside them is matched, so by their functions: keys meet queries as one bilinear form
of the stream, values and output as another. Two such forms have the inner product sum((W W'^T) * (R R'^T)) of the Gram
matrices across both networks, whatever invertible matrix stands inside; under rotary embeddings it is the real part of
the sum over pairs of <q, q'> times the conjugate of <k, k'>, whatever turn and scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment._balance import pairs
from alignment.match.hungarian import hungarian

# One inner space: writers and readers, each (target, donor) rows (heads, queries or 1, n, F)
Rows = list[tuple[Tensor, Tensor]]


def form_similarity(writers: Rows, readers: Rows, rotary: bool) -> Tensor:
    """(K, G, K', G'): cosine of the bilinear forms of target's and donor's query heads, of one inner space."""
    if rotary:
        writers = [(pairs(target), pairs(donor)) for target, donor in writers]
        readers = [(pairs(target), pairs(donor)) for target, donor in readers]
    across = "ahif,bgif->ahbgi" if rotary else "ahif,bgjf->ahbgij"
    within = "ahif,ahif->ahi" if rotary else "ahif,ahjf->ahij"

    def product(equation: str, rows: Rows, first: int, second: int) -> Tensor:
        total = sum(torch.einsum(equation, pair[first], pair[second].conj()) for pair in rows)
        assert isinstance(total, Tensor)
        return total

    def form(equation: str, first: int, second: int) -> Tensor:
        both = product(equation, writers, first, second) * product(equation, readers, first, second).conj()
        return (both.sum(-1) if rotary else both.sum((-1, -2))).real

    dot = form(across, 0, 1)
    one, other = (form(within, number, number).clamp_min(0).sqrt() for number in (0, 1))
    sizes = one[:, :, None, None] * other
    return dot / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


def cover(similarity: Tensor) -> Tensor:  # (n, m)
    """(n,) donor units of largest total similarity, all taken and none more than once oftener than another.

    Where there are more target units than donor units, those left over are assigned again; where there are fewer, donor
    units are left out.
    """
    found = hungarian(similarity)
    while bool((found < 0).any()):
        rest = torch.nonzero(found < 0)[:, 0]
        found[rest] = hungarian(similarity[rest])
    return found


def assign_heads(similarity: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    """(K,) donor groups and (K, G) donor query heads in them, of largest total (K, G, K', G') similarity."""
    groups, queries, donors, others = similarity.shape
    if queries == others == 1:
        outer = torch.arange(groups) if fixed else cover(similarity[:, 0, :, 0])
        return outer, torch.zeros(groups, 1, dtype=torch.int64)
    inside = torch.zeros(groups, donors, queries, dtype=torch.int64)
    score = torch.zeros(groups, donors, dtype=torch.float64)
    for a in range(groups):
        for b in [a] if fixed else range(donors):
            table = similarity[a, :, b]
            inside[a, b] = cover(table)
            score[a, b] = table.gather(1, inside[a, b][:, None]).double().sum()
    outer = torch.arange(groups) if fixed else cover(score)
    return outer, inside[torch.arange(groups), outer]


def expert_similarity(plain: Sequence[tuple[Tensor, Tensor]], inner: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(E, E'): cosines of router rows `plain` (E, F), and of what experts read and write, summed over their neurons.

    `inner` are (E, I, F) rows of an expert's neurons: their squares summed over neurons do not depend on the neurons'
    order or signs.
    """
    described = list(plain) + [(target.square().sum(1), donor.square().sum(1)) for target, donor in inner]
    total = torch.zeros((), dtype=torch.float64)
    for target, donor in described:
        total = total + (_centred(target) @ _centred(donor).mT).cpu()
    return total


def _centred(rows: Tensor) -> Tensor:
    rows = rows.double() - rows.double().mean(0)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
