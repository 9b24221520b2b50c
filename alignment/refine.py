"""Which unit is which, by what their mean does on data: the straight-through estimator of Git Re-Basin (Ainsworth et
al. 2022, arXiv:2209.04836, section 3.3), for small networks.

A free copy of the target's weights is matched to the donor at every step, and the gradient of the loss halfway between
the target and the matched donor goes straight through to the free copy, as if no matching were between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment._balance import blocks_of
from alignment._descent import Descent
from alignment._evaluation import computed, evaluating
from alignment._frank_wolfe import movable
from alignment.align import align
from alignment.maps import Maps
from alignment.match.hungarian import hungarian
from alignment.spaces import Spaces

__all__ = ["refine"]

PLAIN = {"scaled permutation": "signed permutation", "positive permutation": "permutation"}  # scales stay as aligned


def refine(
    module: nn.Module,
    donor: Mapping[str, Tensor],
    spaces: Spaces,
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    *,
    start: Maps | None = None,
    epochs: int = 20,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    seed: int = 0,
) -> Maps:
    """Maps of the donor into the units of `module`, the target, under which the mean of both has the least loss of all
    that were tried; never a larger one than under `start`, by default what `align` finds by weights.

    `batches` are inputs (one, or a tuple of several) with what `loss(outputs, ...)` compares outputs with. Units and
    their signs change places; heads, rotations and scales stay as in `start`. Raises ValueError where there is no batch
    and where nothing may change places.
    """
    if not batches:
        raise ValueError("refine: there are no batches, on which the mean of both networks could be tried")
    own = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    first = align(own, donor, spaces, spaces, sweeps=20) if start is None else start
    carried = first.carry(donor)
    table = _plain(spaces)
    blocks = blocks_of(table, carried)
    free = {name: one.detach().clone().requires_grad_() for name, one in module.named_parameters()}
    optimizer = torch.optim.SGD(free.values(), learning_rate, momentum)
    generator = torch.Generator().manual_seed(seed)

    def halfway(matched: Mapping[str, Tensor], batch: tuple[Any, Any]) -> Tensor:
        mean = {
            name: torch.lerp(one, matched[name], 0.5) if one.is_floating_point() else one for name, one in own.items()
        }
        given = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        return loss(computed(module, mean, given, {}), batch[1])

    def tried(maps: Maps) -> float:
        matched = maps.carry(carried)
        with torch.no_grad():
            return sum(float(halfway(matched, batch)) for batch in batches) / len(batches)

    with evaluating(module):
        maps = best = Maps(table, table, {})
        least = tried(maps)
        for _ in range(epochs):
            for number in torch.randperm(len(batches), generator=generator).tolist():
                held = {**own, **{name: one.detach() for name, one in free.items()}}
                descent = Descent(table, blocks_of(table, held), blocks, hungarian, {}, maps=dict(maps.maps))
                descent.run(5, seed)
                maps = Maps(table, table, descent.maps)
                matched = maps.carry(carried)
                through = {name: matched[name] + one - one.detach() for name, one in free.items()}
                optimizer.zero_grad()
                halfway({**matched, **through}, batches[number]).backward()
                optimizer.step()
            found = tried(maps)
            if found < least:
                best, least = maps, found
    return Maps(spaces, spaces, best.maps).after(first)


def _plain(spaces: Spaces) -> Spaces:
    """The same network, in which units that stand alone change places and all else is fixed."""
    groups = {space.name: PLAIN.get(space.group, space.group) for space in movable(spaces)}
    groups = {name: group for name, group in groups.items() if group.endswith("permutation")}
    if not groups:
        raise ValueError("refine: no units of this network change places alone")
    table = tuple(replace(space, group=groups.get(space.name, "fixed")) for space in spaces.spaces)
    return replace(spaces, spaces=table)
