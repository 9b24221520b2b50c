"""The unit spaces of a network: who writes and who reads each, and which maps of it leave the network's function alone.

A network is a table. Every tensor is cut into parts, and every axis of a part belongs to a space and has a role in it:
it writes the space's units (`w`), reads them (`r`), or lies on them element by element (`e`: norm gains, the gate of a
gated MLP). This is the table from axes to permutations of Git Re-Basin (Ainsworth et al. 2022, arXiv:2209.04836), with
other groups beside the permutations. One element of a space's group acts on all its axes; `alignment.maps` applies it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignment._part import Axis, Part

if TYPE_CHECKING:
    from alignment.maps import Maps

__all__ = ["Axis", "GROUPS", "Norm", "Part", "Space", "Spaces"]

# What each group holds; the kind of map that stands for an element of it is in alignment._acts.
GROUPS = {
    "permutation": "units change places",
    "signed permutation": "units change places and signs",
    "scaled permutation": "units change places; writers times s, readers over s, for any s but 0",
    "positive permutation": "units change places; writers times s, readers over s, for s > 0",
    "orthogonal": "rotations and reflections of the whole space",
    "orthogonal fixing ones": "rotations and reflections that keep the mean of the units",
    "general linear": "any invertible matrix A on writers, its inverse on readers",
    "pair turns": "coordinates i and i + n/2 turn together, times s on writers and 1/s on readers, for each i",
    "pair scales": "coordinates i and i + n/2 times s on writers and 1/s on readers, for any s but 0, for each i",
    "pair signs": "coordinates i and i + n/2 change sign together, for each i",
    "fixed": "nothing may move",
}


@dataclass(frozen=True)
class Space:
    """`size` units, or coordinates, with their group; `within` names the space each unit of which has such a space."""

    name: str
    size: int
    group: str
    within: str | None = None


@dataclass(frozen=True)
class Norm:
    """A normalisation whose gain can be folded into its readers: (tensor, axis of the stored tensor, its bias)."""

    gain: str
    bias: str | None
    readers: tuple[tuple[str, int, str | None], ...]
    offset: float = 0.0  # the factor is offset + gain
    final: bool = False  # read by the output head


@dataclass(frozen=True)
class Spaces:
    """All of a network: its spaces (outer before inner), its parts, its norms, its tied tensors (alias to source)."""

    family: str
    spaces: tuple[Space, ...]
    parts: tuple[Part, ...]
    norms: tuple[Norm, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    passed: tuple[str, ...] = ()  # endings of tensors that hold no weights (masks), carried as they are
    config: str = ""  # JSON of what the table was made from
    layers: tuple[tuple[int, int], ...] | None = None  # as `relabel` was told

    def __post_init__(self) -> None:
        assert len(self.by_name) == len(self.spaces) and len(self.by_key) == len(self.parts)
        for space in self.spaces:
            assert space.group in GROUPS and (space.within is None or space.within in self.by_name), space
        for part in self.parts:
            for axis in part.axes:
                assert axis.space is None or axis.size == self.by_name[axis.space].size, part

    @cached_property
    def by_name(self) -> dict[str, Space]:
        return {space.name: space for space in self.spaces}

    @cached_property
    def by_key(self) -> dict[str, Part]:
        return {part.key: part for part in self.parts}

    @cached_property
    def rank(self) -> dict[str, int]:
        return {space.name: number for number, space in enumerate(self.spaces)}

    @cached_property
    def uses(self) -> dict[str, list[tuple[Part, int]]]:
        """For each space its parts and the axis on which each has it."""
        found: dict[str, list[tuple[Part, int]]] = {space.name: [] for space in self.spaces}
        for part in self.parts:
            for number, axis in enumerate(part.axes):
                if axis.space is not None:
                    found[axis.space].append((part, number))
        return found

    def copies(self, space: Space) -> int:
        """How many spaces of this name there are: one for each unit of the space it lies within."""
        return 1 if space.within is None else self.by_name[space.within].size

    def inner(self, name: str) -> tuple[Space, ...]:
        """The spaces that lie within this one."""
        return tuple(space for space in self.spaces if space.within == name)

    def order(self, part: Part) -> list[int]:
        """Axes of a part that have a space, outer spaces first: maps of inner spaces are in the order that results."""
        having = [(self.rank[axis.space], number) for number, axis in enumerate(part.axes) if axis.space is not None]
        return [number for _, number in sorted(having)]

    def within_axis(self, part: Part, number: int) -> int | None:
        """The axis of a part on which the copies of its space `number` lie."""
        name = part.axes[number].space
        assert name is not None
        outer = self.by_name[name].within
        if outer is None:
            return None
        return next(other for other, axis in enumerate(part.axes) if axis.space == outer)

    def of(self, tensors: Iterable[str]) -> Spaces:
        """These spaces in the spelling of a checkpoint's names: a file may hold experts apart, or lack a prefix."""
        names = frozenset(tensors)
        needed = {name for part in self.parts if not part.optional for name in part.names}
        own = needed | {name for part in self.parts for name in part.names} | {alias for alias, _ in self.ties}
        if not self.config or (needed <= names and all(name in own or self._passes(name) for name in names)):
            return self
        from alignment.families import find_family

        found = find_family(json.loads(self.config), names)
        if self.layers is not None:
            found = found.relabel(dict(self.layers))
        return replace(found, spaces=self.spaces) if found.rank == self.rank else found

    def _passes(self, name: str) -> bool:
        return bool(self.passed) and name.endswith(self.passed)

    def relabel(self, layers: Mapping[int, int]) -> Spaces:
        """The same network with layer i called layer `layers[i]`; the others' spaces are called `unmatched.i`."""

        def called(name: str) -> str:
            words = name.split(".")
            if words[0] != "layers":
                return name
            number = int(words[1])
            start = ["layers", str(layers[number])] if number in layers else ["unmatched", words[1]]
            return ".".join([*start, *words[2:]])

        def renamed(axis: Axis) -> Axis:
            return axis if axis.space is None else replace(axis, space=called(axis.space))

        assert self.layers is None, "layers were called otherwise already"
        return replace(
            self,
            layers=tuple(layers.items()),
            spaces=tuple(
                replace(space, name=called(space.name), within=space.within and called(space.within))
                for space in self.spaces
            ),
            parts=tuple(
                replace(part, key=called(part.key), axes=tuple(renamed(axis) for axis in part.axes))
                for part in self.parts
            ),
        )

    def only(self, globs: Iterable[str]) -> Spaces:
        """The same network, in which nothing moves but spaces called like one of these (`layers.*.mlp`).

        Raises ValueError for one that no space is called like.
        """
        chosen: set[str] = set()
        for glob in globs:
            found = [name for name in self.by_name if fnmatchcase(name, glob)]
            if not found:
                near = get_close_matches(glob, self.by_name, 1)
                guess = f"; did you mean '{near[0]}'?" if near else f"; there are {_few(list(self.by_name))}"
                raise ValueError(f"no space is called like '{glob}'{guess}")
            chosen.update(found)
        spaces = (space if space.name in chosen else replace(space, group="fixed") for space in self.spaces)
        return replace(self, spaces=tuple(spaces))

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError where a tensor is missing, is not in the table, or has a shape that the config does not give."""
        _check(self.of(tensors), tensors)

    def random_symmetry(self, seed: int) -> Maps:
        """A random, well-conditioned element of the whole group: carried by it, the network computes the same."""
        import torch

        from alignment._groups import draw
        from alignment.maps import Maps

        generator = torch.Generator().manual_seed(seed)
        drawn = {space.name: draw(space, self.copies(space), generator) for space in self.spaces}
        return Maps(self, self, {name: map for name, map in drawn.items() if map is not None})

    def to_json(self) -> str:
        """The whole table as JSON; `from_json` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Spaces:
        """What `to_json` wrote."""
        table: dict[str, Any] = json.loads(text)
        return Spaces(
            table["family"],
            tuple(Space(**space) for space in table["spaces"]),
            tuple(_part(part) for part in table["parts"]),
            tuple(
                Norm(n["gain"], n["bias"], tuple((r[0], r[1], r[2]) for r in n["readers"]), n["offset"], n["final"])
                for n in table["norms"]
            ),
            tuple((alias, source) for alias, source in table["ties"]),
            tuple(table["passed"]),
            table["config"],
            None if table["layers"] is None else tuple((own, other) for own, other in table["layers"]),
        )


def _check(spaces: Spaces, tensors: Mapping[str, Tensor]) -> None:
    known = {name for part in spaces.parts for name in part.names}
    missing = [n for part in spaces.parts if not part.optional for n in part.names if n not in tensors]
    if missing:
        missing = list(dict.fromkeys(missing))
        raise ValueError(f"{spaces.family}: {_few(missing)} of its config {_are(missing)} not in the checkpoint")
    aliases = {alias for alias, _ in spaces.ties}
    extra = [name for name in tensors if name not in known | aliases and not spaces._passes(name)]
    if extra:
        raise ValueError(f"{spaces.family}: no space is known for {_few(extra)}, which its config does not give")
    for part in spaces.parts:
        for name in part.names:
            if name in tensors and not part.fits(tuple(tensors[name].shape)):
                given, wanted = tuple(tensors[name].shape), "x".join(map(str, part.shape)).replace("-1", "any")
                raise ValueError(f"{name} has shape {given}, and its config gives {wanted}")
    for alias, source in spaces.ties:
        if alias in tensors and tensors[alias] is not tensors[source] and not tensors[alias].equal(tensors[source]):
            raise ValueError(
                f"the config ties {alias} to {source}, and the two differ: set tie_word_embeddings to false"
            )


def _part(fields: dict[str, Any]) -> Part:
    return Part(
        fields["key"],
        tuple(fields["names"]),
        tuple(fields["shape"]),
        tuple(fields["grid"]),
        tuple((dim, start, length) for dim, start, length in fields["take"]),
        tuple(Axis(**axis) for axis in fields["axes"]),
        fields["offset"],
        fields["optional"],
        fields["factor"],
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
