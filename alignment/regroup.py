"""Another number of key-value heads: copies of heads, or means of those likest (Ainsworth et al. 2023,
arXiv:2305.13245, there of neighbours, coordinate by coordinate).

Query heads stay as many as they are. What a head's coordinates mean is its own matter, so heads are turned to agree
before they are averaged: rotary pairs of keys in phase and length, values by the invertible matrix that takes one
head's second moments to the other's and correlates both best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Turn
from alignment._balance import _power, blocks_of, pairs, unfold
from alignment.families import find_family
from alignment.maps import Maps
from alignment.match.procrustes import procrustes
from alignment.spaces import Space, Spaces

__all__ = ["regroup"]


def regroup(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], groups: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network and its config with `groups` key-value heads in each layer.

    More of them compute the same; of fewer, each is the mean of those likest. Raises ValueError for a family whose
    config has no number of groups, and for numbers that do not divide each other or the query heads.
    """
    count, heads = config.get("num_key_value_heads"), config.get("num_attention_heads")
    if count is None or heads is None:
        raise ValueError(f"regroup: the config of a {config.get('model_type')} network has no num_key_value_heads")
    if groups < 1 or heads % groups or (groups % count and count % groups):
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and (n % count == 0 or count % n == 0)]
        raise ValueError(f"regroup: {count} groups of {heads} heads become {', '.join(map(str, fits))}, not {groups}")
    source = find_family(config, frozenset(tensors))
    source.check(tensors)
    if groups < count:
        tensors = _agreeing(source, tensors, count // groups)
    changed = {**config, "num_key_value_heads": groups}
    out = dict(tensors)
    for part in find_family(changed, frozenset(tensors)).parts:
        own = source.by_key[part.key]
        names = [axis.space or "" for axis in own.axes]
        at = next((number for number, name in enumerate(names) if name.endswith(".kv")), None)
        if at is None or any(name not in tensors for name in own.names):
            continue
        block = own.read(tensors)
        if names[at + 1].endswith(".q"):
            block = block.flatten(at, at + 1).unflatten(at, (groups, heads // groups))
        elif groups > count:
            block = block.repeat_interleave(groups // count, at)
        else:
            block = block.unflatten(at, (groups, count // groups)).mean(at + 1)
        for name in part.names:
            if out[name] is tensors[name]:
                shape = [block.numel() if size == -1 else size for size in part.shape]
                out[name] = tensors[name].new_empty(shape)
        part.write(block, out)
    return out, changed


def _agreeing(spaces: Spaces, tensors: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
    """The same network, `size` heads that are likest beside each other, in the coordinates of the first of them."""
    blocks = blocks_of(spaces, tensors)
    heads = [space for space in spaces.spaces if space.name.endswith(".kv")]
    inner = {space.name: [one for one in spaces.inner(space.name) if not one.name.endswith(".q")] for space in heads}
    maps: dict[str, Map] = {}
    for space in heads:
        rows = {one.name: _rows(spaces, one, blocks) for one in inner[space.name]}
        order = _together(sum(_likeness(one, rows[one.name]) for one in inner[space.name]), size)
        lead = order.view(-1, size)[:, :1].expand(-1, size).flatten()
        maps[space.name] = Index(order)
        maps |= {one.name: _turned(one, rows[one.name][lead], rows[one.name][order]) for one in inner[space.name]}
    return Maps(spaces, spaces, maps).carry(tensors)


def _rows(spaces: Spaces, space: Space, blocks: Mapping[str, Tensor]) -> Tensor:
    """(heads, n, F) rows of what is averaged, keys or values; (heads, n / 2, F) complex where pairs turn."""
    uses = [
        (part, number)
        for part, number in spaces.uses[space.name]
        if part.key in blocks and not any((axis.space or "").endswith(".q") for axis in part.axes)
    ]
    rows = torch.cat([unfold(spaces, part, number, blocks[part.key]) for part, number in uses], 2).double()
    return pairs(rows) if space.group.startswith("pair") else rows


def _likeness(space: Space, rows: Tensor) -> Tensor:
    """(heads, heads) mean correlation of coordinates of heads, in the best ones."""
    if space.group == "general linear":
        even = _power(rows @ rows.mT, -0.5) @ rows
        return torch.linalg.matrix_norm(torch.einsum("aif,bjf->abij", even, even), "nuc") / space.size
    even = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    both = torch.einsum("aif,bif->abi", even, even.conj())
    return (both.abs() if space.group == "pair turns" else both.real.abs()).mean(-1)


def _together(likeness: Tensor | int, size: int) -> Tensor:
    """(heads,) an order in which each `size` heads are a group, the first that is left and those likest it."""
    assert isinstance(likeness, Tensor)
    left, order = list(range(len(likeness))), []
    while left:
        first = left[0]
        chosen = [first, *sorted(left[1:], key=lambda one: -float(likeness[first, one]))[: size - 1]]
        order += chosen
        left = [one for one in left if one not in chosen]
    return torch.tensor(order)


def _turned(space: Space, lead: Tensor, rows: Tensor) -> Map:
    """What takes each head into the coordinates, and the scales, of the one that leads its group."""
    if space.group == "general linear":
        own, other = lead @ lead.mT, rows @ rows.mT
        q = procrustes(_power(own, -0.5) @ lead @ rows.mT @ _power(other, -0.5))
        there, back = _power(own, 0.5) @ q @ _power(other, -0.5), _power(other, 0.5) @ q.mT @ _power(own, -0.5)
        return Matrix(there, back)
    dot = (lead * rows.conj()).sum(-1)
    turn = torch.sgn(dot) if space.group == "pair turns" else torch.sgn(dot.real).to(dot.dtype)
    turn = torch.where(turn == 0, 1, turn)
    if space.group == "pair turns":  # keys read, and take one over the conjugate
        size, own = rows.norm(dim=-1), lead.norm(dim=-1)
        both = (size > 0) & (own > 0)  # a dead pair has no scale
        turn = turn * torch.where(both, size / torch.where(both, own, 1), 1)
    return Turn(turn)
