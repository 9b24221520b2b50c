"""Scales of neurons whose weights other scales lie on too: a chain of layers is balanced together.

Where each tensor meets one space that scales, a unit's scale has a closed form. In an MLP a layer's weights read one
such space and write the next; scales that make all units even (writers and readers of equal norm) minimise the sum of
squares of all weights, a convex problem in their logarithms, so that going through the spaces in turn finds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alignment._acts import Index, Map
from alignment.spaces import Spaces

GROUPS = ("scaled permutation", "positive permutation")
POWER = {"w": 2, "r": -2}  # of a scale, in the square of a weight
ROUNDS = 500


def even(spaces: Spaces, blocks: Mapping[str, Tensor], found: Mapping[str, Map]) -> dict[str, Map]:
    """The maps with the scales of spaces that meet in a tensor made even together; all others stay as they are."""
    having = {space.name for space in spaces.spaces if space.group in GROUPS and space.within is None} & set(found)
    meeting: set[str] = set()
    uses = []
    for key, block in blocks.items():
        part = spaces.by_key[key]
        axes = [(n, axis.space or "", axis.role) for n, axis in enumerate(part.axes) if axis.space in having]
        axes = [axis for axis in axes if axis[2] in POWER]
        if not axes:
            continue
        if len({name for _, name, _ in axes}) > 1:
            meeting |= {name for _, name, _ in axes}
        rest = [n for n in range(block.dim()) if n not in [number for number, _, _ in axes]]
        squares = block.double().square()
        uses.append((squares.sum(rest) if rest else squares, [axis[1:] for axis in axes]))
    if not meeting:
        return dict(found)
    scales: dict[str, Tensor] = {}
    for name in found:
        map = found[name]
        if name in meeting and isinstance(map, Index):
            scales[name] = torch.ones_like(map.index, dtype=torch.float64, device=uses[0][0].device)
    for _ in range(ROUNDS):
        change = 0.0
        for name in scales:
            step = _step(name, uses, scales)
            scales[name] = scales[name] * step
            change = max(change, float((step - 1).abs().max()))
        if change < 1e-14:
            break
    out = dict(found)
    for name, scale in scales.items():
        out[name] = Index(torch.arange(len(scale)), scale.cpu())
    return out


def _step(name: str, uses: list[tuple[Tensor, list[tuple[str, str]]]], scales: Mapping[str, Tensor]) -> Tensor:
    """(n,) what the scales of one space are to be multiplied by, all others as they are."""
    norms = {"w": torch.zeros_like(scales[name]), "r": torch.zeros_like(scales[name])}
    for squares, axes in uses:
        for own, (space, role) in enumerate(axes):
            if space != name:
                continue
            total = squares
            for number, (other, part) in enumerate(axes):
                if other in scales:
                    shape = [-1 if n == number else 1 for n in range(len(axes))]
                    total = total * scales[other].pow(POWER[part]).view(shape)
            rest = [n for n in range(len(axes)) if n != own]
            norms[role] = norms[role] + (total.sum(rest) if rest else total)
    live = (norms["w"] > 0) & (norms["r"] > 0)
    return torch.where(live, norms["r"] / torch.where(live, norms["w"], 1), 1).pow(0.25)
