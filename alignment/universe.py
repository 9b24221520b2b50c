"""Several networks in one universe of units, so that going from one to another never depends on the way.

C2M3 (Crisostomi et al. 2024, arXiv:2405.17897): the map from network q to p is q's map into the universe and back along
p's, which makes all of them cycle consistent, and the likeness of all pairs is climbed together. There with
permutations only; here rotations too, towards a common mean (generalised Procrustes, Gower 1975), and signs, phases,
heads and experts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignment._acts import Map, settle
from alignment._balance import balance, blocks_of
from alignment._descent import Descent, carry
from alignment._frank_wolfe import climb, held
from alignment._joint import Blocks, Joint
from alignment.maps import Maps
from alignment.match.hungarian import hungarian
from alignment.spaces import Spaces

__all__ = ["between", "universe"]

ROUNDING = 200 * torch.finfo(torch.float32).eps


def universe(
    networks: Sequence[Mapping[str, Tensor]],
    spaces: Spaces,
    *,
    steps: int | None = None,
    sweeps: int = 20,
    seed: int = 0,
) -> list[Maps]:
    """For each network its maps into the universe: exact symmetries, whose carried tensors may be averaged.

    All networks have the spaces of one table, and are compared by weights. The start are the units of the network that
    the others, each aligned to it alone, are likest to. `steps` are of Frank-Wolfe, in which units and rotations of all
    networks move together (heads, experts and what is inside them wait); by default 20, and none where its matrices
    would take more than a gibibyte. Then each network in turn takes the maps under which it is likest the sum of the
    others, at most `sweeps` times and until nothing improves; also from the start, and the maps with the greater
    likeness of all pairs are taken. In another order of the networks the maps are the same, in that order. `seed` names
    the order of spaces within a sweep.
    Raises ValueError for fewer than two networks, and where tensors do not fit the table or are not finite.
    """
    if len(networks) < 2:
        raise ValueError(f"universe: {len(networks)} network is given; give two or more")
    even, blocks = _balanced(networks, spaces)
    found, order = _start(Joint(spaces, blocks), seed)
    joint = Joint(spaces, [blocks[number] for number in order])
    start = [found[number] for number in order]
    if steps is None:
        steps = 20 if len(networks) * held(spaces) <= 1 << 30 else 0
    ways: list[Sequence[Mapping[str, Map]]] = [joint.ascend(start, sweeps, seed)]
    if steps:
        ways.append(joint.ascend(climb(spaces, start, joint.best, joint.likeness, steps), sweeps, seed))
    likest = max(ways, key=joint.likeness)
    into = dict(zip(order, likest))
    return [Maps(spaces, spaces, into[number]).after(one) for number, one in enumerate(even)]


def between(target: Maps, donor: Maps) -> Maps:
    """From the donor's units to the target's, through the universe that both have maps into."""
    found = target.inverse().after(donor)
    return Maps(donor.source, target.source, {name: settle(map, ROUNDING) for name, map in found.maps.items()})


def _balanced(networks: Sequence[Mapping[str, Tensor]], spaces: Spaces) -> tuple[list[Maps], list[Blocks]]:
    """Each network's maps into balanced units, and its parts there, each over its root mean square."""
    tables = [spaces.of(tensors) for tensors in networks]
    for table, tensors in zip(tables, networks):
        table.check(tensors)
    read = [blocks_of(table, tensors) for table, tensors in zip(tables, networks)]
    keys = [key for key in read[0] if all(key in one for one in read)]
    found, blocks = [], []
    for table, one in zip(tables, read):
        maps = balance(table, {key: one[key] for key in keys})
        found.append(Maps(table, spaces, maps))
        moved = {key: carry(spaces, maps, spaces.by_key[key], one[key]) for key in keys}
        blocks.append({key: _even(block) for key, block in moved.items()})
    return found, blocks


def _even(block: Tensor) -> Tensor:
    size = float(torch.linalg.vector_norm(block)) / max(1, block.numel()) ** 0.5
    return block / size if size > 0 else block


def _start(joint: Joint, seed: int) -> tuple[list[dict[str, Map]], list[int]]:
    """Maps into the units of the network that the others are likest to, and the networks' numbers, likest first."""
    count = len(joint.blocks)
    found: list[list[dict[str, Map]]] = [[{} for _ in range(count)] for _ in range(count)]
    alike = []
    for target in range(count):
        totals = []
        for donor in range(count):
            if donor == target:
                continue
            one = Descent(joint.spaces, joint.blocks[target], joint.blocks[donor], hungarian, {}, scaled=True)
            one.run(5, seed)
            found[target][donor] = one.maps
            totals.append(one.total())
        alike.append(math.fsum(totals))  # exact, so that it does not depend on the networks' order
    order = sorted(range(count), key=lambda number: (-alike[number], _digest(joint.blocks[number])))
    return found[order[0]], order


def _digest(blocks: Blocks) -> str:
    """What tells two networks apart that the others are equally like."""
    found = hashlib.sha256()
    for block in blocks.values():
        found.update(block.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
