"""Several balanced networks and their maps into one universe, which no network has a special part in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment._acts import Map
from alignment._descent import PIECE, Descent, carry
from alignment.match.hungarian import hungarian
from alignment.spaces import Space, Spaces

STALL = 1e-6  # of the likeness: a smaller gain is rounding
Blocks = dict[str, Tensor]  # by key


@dataclass(frozen=True)
class Others(Mapping[str, Tensor]):
    """The sum of all networks but one, in the universe, made when it is asked for."""

    carried: Sequence[Blocks]
    but: int

    def __getitem__(self, key: str) -> Tensor:
        rest = [blocks[key] for number, blocks in enumerate(self.carried) if number != self.but]
        return torch.stack(rest).sum(0) if len(rest) > 1 else rest[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.carried[self.but])

    def __len__(self) -> int:
        return len(self.carried[self.but])


@dataclass(frozen=True)
class Joint:
    """The networks' blocks, each of root mean square one."""

    spaces: Spaces
    blocks: Sequence[Blocks]

    def carried(self, maps: Sequence[Mapping[str, Map]]) -> list[Blocks]:
        return [
            {key: carry(self.spaces, own, self.spaces.by_key[key], block) for key, block in blocks.items()}
            for own, blocks in zip(maps, self.blocks)
        ]

    def likeness(self, maps: Sequence[Mapping[str, Map]]) -> float:
        """The sum of inner products of all pairs of networks in the universe."""
        return _likeness(self.carried(maps))

    def best(self, maps: Sequence[Mapping[str, Map]], free: Sequence[Space]) -> list[dict[str, Map]]:
        """For all networks at once the maps of spaces under which each is likest the others, all else as it is."""
        carried = self.carried(maps)
        found = []
        for number, own in enumerate(maps):
            one: dict[str, Map] = {}
            for space in free:
                descent = self._descent(carried, number, dict(own))
                descent.update(space, everything=True)
                one |= {space.name: descent.maps[space.name]} if space.name in descent.maps else {}
            found.append(one)
        return found

    def ascend(self, start: Sequence[Mapping[str, Map]], sweeps: int, seed: int) -> list[dict[str, Map]]:
        """Space by space, network by network, the map under which it is likest the others, until nothing improves."""
        generator = torch.Generator().manual_seed(seed)
        outer = [space for space in self.spaces.spaces if space.within is None]
        maps = [dict(one) for one in start]
        carried = self.carried(maps)
        best, kept = _likeness(carried), [dict(one) for one in maps]
        for _ in range(sweeps):
            for number in torch.randperm(len(outer), generator=generator).tolist():
                space = outer[number]
                names = {space.name, *(inner.name for inner in self.spaces.inner(space.name))}
                keys = {part.key for name in names for part, _ in self.spaces.uses[name]}
                for own in range(len(maps)):
                    descent = self._descent(carried, own, maps[own])
                    descent.visit(space, everything=True)
                    for key in keys & self.blocks[own].keys():
                        part = self.spaces.by_key[key]
                        carried[own][key] = carry(self.spaces, maps[own], part, self.blocks[own][key])
            likeness = _likeness(carried)
            if likeness <= best + STALL * abs(best):
                break
            best, kept = likeness, [dict(one) for one in maps]
        return kept

    def _descent(self, carried: Sequence[Blocks], number: int, maps: dict[str, Map]) -> Descent:
        rest = Others(carried, number)
        return Descent(self.spaces, rest, self.blocks[number], hungarian, {}, maps=maps, scaled=True)


def _likeness(carried: Sequence[Blocks]) -> float:
    found = 0.0
    for number, one in enumerate(carried):
        for other in carried[:number]:
            for key, block in one.items():
                pieces = zip(block.flatten().split(PIECE), other[key].flatten().split(PIECE))
                found += sum(float(a @ b) for a, b in pieces)
    return found
