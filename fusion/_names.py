"""Names of tensors: a model under the names of another, and which layer a name is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.names import Made, correspond

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.checkpoint import Entry, Source


@dataclass(frozen=True)
class Renamed:
    """A model that is read under the names of a target, tensors put together or cut where these are; a Source."""

    model: Source
    made: Mapping[str, Made]
    entries: Mapping[str, Entry]

    @property
    def path(self) -> Path:
        return self.model.path

    @property
    def config(self) -> dict[str, Any]:
        return self.model.config

    @property
    def files(self) -> tuple[Path, ...]:
        return self.model.files

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        shapes = {own: self.model.entries[own].shape for own, _, _ in self.made[name].stretches}
        for own, first, at, count in self.made[name].runs(shapes, start, stop):
            self.model.read(own, first, first + count, into[at : at + count])


def renamed(name: str, model: Source, table: Any, target: Source) -> Renamed:
    """The model under the target's names; ValueError, with its name, where not every tensor of it has its place."""
    shapes = [{key: entry.shape for key, entry in one.entries.items()} for one in (model, target)]
    try:
        made = correspond(table, *shapes)
    except ValueError as error:
        raise ValueError(f"names of {name}: {error}") from None
    entries = {}
    for key, one in made.items():
        parts = [model.entries[own] for own, _, _ in one.stretches]
        odd = next((part for part in parts if (part.dtype, part.stored) != (parts[0].dtype, parts[0].stored)), None)
        if odd is not None:
            raise ValueError(
                f"names of {name}: {key} would be {parts[0].name}, which is {str(parts[0].dtype)[6:]}, and {odd.name}, "
                f"which is {str(odd.dtype)[6:]}"
            )
        entries[key] = type(parts[0])(key, one.shape, parts[0].dtype, parts[0].stored)
    return Renamed(model, made, entries)


def split(name: str) -> tuple[str, int, str] | None:
    """("model.layers.", 7, ".mlp.up_proj.weight"): the first component that is a number; None when there is none."""
    found = re.match(r"((?:[^.]*[^.\d][^.]*\.|\.)*)(\d+)(\..*|$)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def kind(name: str) -> str:
    """A name without its layer: mlp.up_proj.weight, or all of it outside the layers."""
    parts = split(name)
    return parts[2].lstrip(".") if parts else name
