"""Writing a family down: its config read, its spaces and parts collected in a few lines a layer."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.spaces import Axis, Norm, Part, Space, Spaces

Config = Mapping[str, Any]
Sizes = tuple[int | tuple[int, ...], ...]  # of a stored tensor; an axis that is to be split is written as its factors
FOLDED = "norms_folded"  # the key by which `fold` tells that no gain lies on the residual stream any more


def need(config: Config, *names: str) -> Any:
    """The first of these that a config has; ValueError when it has none."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ValueError(f"the config of a {config.get('model_type')} network has no '{names[0]}'")


def get(config: Config, name: str, default: Any) -> Any:
    """What a config says, or what its class would where it says nothing."""
    value = config.get(name)
    return default if value is None else value


def rotary(config: Config, head: int, default: float = 1.0) -> int:
    """Coordinates of a head that rotate."""
    rope = get(config, "rope_parameters", {}) or {}
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct")
    return int(head * (default if share is None else share))


@dataclass
class Table:
    """Spaces, parts, norms and ties as they are written down; `spaces()` hands them over."""

    config: Config
    names: Collection[str] = ()  # of a checkpoint's tensors, where its spelling matters
    listed: list[Space] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)

    def space(self, name: str, size: int, group: str, within: str | None = None) -> str:
        """A space; its name."""
        self.listed.append(Space(name, size, group, within))
        return name

    def part(
        self,
        key: str,
        names: str | tuple[str, ...],
        shape: Sizes,
        axes: tuple[str | int, ...],
        take: tuple[tuple[int, int, int], ...] = (),
        offset: float = 0.0,
        optional: bool = False,
        factor: float = 1.0,
    ) -> None:
        """A part; an axis is `space:role`, or the length of one that belongs to no space."""
        names = (names,) if isinstance(names, str) else names
        grid = [size for sizes in shape for size in (sizes if isinstance(sizes, tuple) else (sizes,))]
        if len(names) > 1:
            grid.insert(0, len(names))
        sizes = {space.name: space.size for space in self.listed}
        found = []
        for axis in axes:
            if isinstance(axis, int):
                found.append(Axis(axis))
            else:
                space, _, role = axis.rpartition(":")
                assert role in ("w", "r", "e"), axis
                found.append(Axis(sizes[space], space, role))
        stored = tuple(math.prod(s) if isinstance(s, tuple) else s for s in shape)
        self.parts.append(Part(key, names, stored, tuple(grid), take, tuple(found), offset, optional, factor))

    def norm(
        self,
        key: str,
        stem: str,
        space: str,
        readers: tuple[tuple[str, int, str | None], ...] = (),
        bias: bool = False,
        offset: float = 0.0,
        final: bool = False,
        optional: bool = False,
    ) -> None:
        """A norm's gain (and bias) on a space; with readers its gain can be folded into them."""
        size = {listed.name: listed.size for listed in self.listed}[space]
        self.part(f"{key}.gain", f"{stem}.weight", (size,), (f"{space}:e",), offset=offset, optional=optional)
        if bias:
            self.part(f"{key}.bias", f"{stem}.bias", (size,), (f"{space}:w",), optional=optional)
        if readers:
            self.norms.append(Norm(f"{stem}.weight", f"{stem}.bias" if bias else None, readers, offset, final))

    def head(self, name: str, source: str, reader: str, vocabulary: int) -> None:
        """The output head: tied to the embeddings, or a reader of its own."""
        if self.config["tie_word_embeddings"]:
            self.ties.append((name, source))
        else:
            self.part("head.weight", name, (vocabulary, self.size(reader)), ("vocabulary:w", f"{reader}:r"))

    def size(self, space: str) -> int:
        return next(listed.size for listed in self.listed if listed.name == space)

    def spaces(self, passed: tuple[str, ...] = ()) -> Spaces:
        """All of it, frozen."""
        return Spaces(
            str(self.config["model_type"]),
            tuple(self.listed),
            tuple(self.parts),
            tuple(self.norms),
            tuple(self.ties),
            passed,
            json.dumps(self.config, sort_keys=True, default=str),
        )


def residual(table: Table, size: int, unfolded: str, folded: str) -> str:
    """The residual stream: one space for all layers; a larger group once no norm gain lies on it."""
    return table.space("residual", size, folded if table.config.get(FOLDED) else unfolded)


def pooler(table: Table, stem: str, without: tuple[str, ...], group: str) -> str:
    """The space of a pooler, if the checkpoint or the class that the config names has one; else the stream."""
    classes = get(table.config, "architectures", [])
    there = (
        any(name.startswith(stem) for name in table.names)
        if table.names
        else bool(classes) and classes[0] not in without
    )
    if not there:
        return "residual"
    width = table.size("residual")
    space = table.space("pooler", width, group)
    table.part("pooler.weight", f"{stem}.weight", (width, width), (f"{space}:w", "residual:r"))
    table.part("pooler.bias", f"{stem}.bias", (width,), (f"{space}:w",))
    return space


def prefix(stem: str, names: Collection[str], first: str) -> str:
    """A model's prefix, or none where a checkpoint's names begin without it (`first` is how they do)."""
    return "" if any(name.startswith(first) for name in names) else stem
