"""A network written into a wider one of its family, its function kept: every change of width that is exact.

Units that a non-linearity sees apart are copied, and what reads them is shared out among the copies (Chen et al. 2016,
arXiv:1511.05641). A stream whose norm only divides by the root mean square grows into any width: the new directions
are empty, and a factor makes up for the mean over more of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix
from alignment._sizes import inside_scale, mixed, scaled
from alignment.maps import Maps
from alignment.spaces import Space, Spaces

__all__ = ["widen"]


def widen(donor: Spaces, target: Spaces) -> Maps:
    """Maps whose `carry` writes a donor's tensors in the wider target's sizes, with the same outputs.

    Raises ValueError, naming the space, for what no map does exactly: a smaller space, a residual stream whose width is
    no multiple under gains or LayerNorm, other rotary coordinates, more experts or another vocabulary.
    """
    maps: dict[str, Map] = {}
    if inside_scale(donor) != inside_scale(target):
        raise ValueError(
            "their configs divide the products of queries and keys by other numbers (query_pre_attn_scalar)"
        )
    for space in target.spaces:
        own = donor.by_name.get(space.name)
        if own is None or own.group != space.group:
            raise ValueError(f"a {donor.family} network has no space '{space.name}' with the group '{space.group}'")
        reason = mixed(space, own, target, donor)
        if reason:
            raise ValueError(f"space '{space.name}': {reason}, so no map keeps what attention sees")
        if space.size != own.size:
            map = _wider(space, own.size)
            maps[space.name] = map if space.within is None else _copied(map, target.copies(space))
    return Maps(donor, target, scaled(maps, target, donor))


def _wider(space: Space, size: int) -> Map:
    """The map of one space, or of one copy of it, from `size` units."""
    what = f"space '{space.name}' has {size} units in the one network and {space.size} in the other"
    if space.size < size:
        raise ValueError(f"{what}: no map makes a network narrower exactly")
    if space.group == "fixed" or space.group.startswith("pair") or space.name.endswith("experts"):
        raise ValueError(f"{what}, and nothing can be added to it without a change of function")
    whole = space.size % size == 0
    if space.group == "general linear" or (space.group == "orthogonal" and not whole):
        eye = torch.eye(space.size, size, dtype=torch.float64)
        return Matrix(eye, eye.mT.contiguous())
    if space.name == "residual" and not whole:
        raise ValueError(
            f"{what}, which is no multiple of it: under gains or LayerNorm the stream can only be copied whole"
        )
    return Index(torch.arange(space.size) % size)


def _copied(map: Map, copies: int) -> Map:
    def stack(one: Tensor) -> Tensor:
        return one.expand(copies, *one.shape).contiguous()

    if isinstance(map, Index):
        return Index(stack(map.index))
    assert isinstance(map, Matrix)
    return Matrix(stack(map.write), stack(map.read))
