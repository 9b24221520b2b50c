"""One network in another's units: the maps of all spaces, checked, applied, saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Plan, Turn, act, after, inverse, missing, reorder, still
from alignment._groups import why_not
from alignment.spaces import Part, Spaces

__all__ = ["Index", "Map", "Maps", "Matrix", "Plan", "Turn"]

HALF = (torch.bfloat16, torch.float16)


class Lacking(NamedTuple):
    """What maps do not carry: parts that stay the target's, with the reason; units of a space that do; parts of the
    donor that are left out."""

    kept: dict[str, str]
    units: dict[str, int]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Maps:
    """From the donor's spaces `source` to the target's: a map by space name; a space without one stays as it is.

    `kept` are parts that the donor has and that do not correspond, each with the reason: they stay the target's.
    """

    source: Spaces
    target: Spaces
    maps: Mapping[str, Map]
    kept: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def moving(self) -> dict[str, Map]:
        """The maps that are not the identity; one that leaves units out is none, wherever the others stay."""
        return {name: map for name, map in self.maps.items() if not still(map) or self._resized(name)}

    def _resized(self, name: str) -> bool:
        own, other = self.target.by_name.get(name), self.source.by_name.get(name)
        return own is not None and other is not None and own.size != other.size

    def check(self, spaces: Spaces) -> None:
        """ValueError, with the space and the reason, where these maps are no exact symmetry of a network `spaces`."""
        for name, map in self.maps.items():
            if name not in spaces.by_name:
                raise ValueError(
                    f"there is no space '{name}' in a {spaces.family} network; the residual stream is one space, since "
                    "the skips add what all layers write"
                )
            space = spaces.by_name[name]
            reason = why_not(space, spaces.copies(space), map)
            if reason:
                raise ValueError(f"space '{name}': {reason}")
        for part in self.source.parts:
            if part.key not in spaces.by_key:
                if all(axis.space not in self.maps for axis in part.axes):
                    continue
                raise ValueError(f"these maps move {part.key}, which a {spaces.family} network does not have")
            for own, given in zip(part.axes, spaces.by_key[part.key].axes):
                if (own.space, own.role) != (given.space, given.role) and own.space in self.maps:
                    raise ValueError(
                        f"these maps take {part.key} as {_role(own.role)} of '{own.space}', and it is "
                        f"{f'{_role(given.role)} of {given.space!r}' if given.space else 'in no space there'}"
                    )

    def carry(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The donor's tensors in the target's units, new tensors in the names and layout of the target.

        `into` are the target's tensors: what the donor has no counterpart of comes from them, and what the target has
        no place for is left out. Without it every part must have its counterpart. Raises ValueError where one has none,
        and where tensors do not fit the donor's config.
        """
        source = self.source.of(tensors)
        source.check(tensors)
        target = source if self.target == self.source else self.target.of(into) if into is not None else self.target
        out: dict[str, Tensor] = {}
        lacking: list[str] = []
        taken: set[str] = set()
        for part in target.parts:
            if into is not None and part.optional and any(name not in into for name in part.names):
                continue  # the target has no place for it
            donor = None if part.key in self.kept else _counterpart(source, part)
            if donor is None or any(name not in tensors for name in donor.names):
                if not part.optional and into is None:
                    lacking.append(part.key)
                if into is not None:
                    out.update({name: into[name].clone() for name in part.names if name in into and name not in out})
                continue
            taken.add(donor.key)
            read = donor.read(tensors)
            dtype = read.dtype
            # sums of products in half precision would add an error of their own
            block = self.block(source, donor, read.float() if dtype in HALF else read)
            if donor.offset != part.offset:  # a gain that one family stores as it is and another less 1
                block = block + (donor.offset - part.offset)
            if donor.factor != part.factor:  # embeddings that one family multiplies by the root of its width
                block = block * (donor.factor / part.factor)
            block = block.to(dtype)
            block = self._completed(target, part, block, into)
            for name, piece in zip(part.names, block.unbind(0) if len(part.names) > 1 else [block]):
                if name not in out:
                    out[name] = into[name].clone() if into is not None else piece.new_empty(part.stored(piece))
            part.write(block, out)
        if lacking:
            raise ValueError(
                f"the donor has no counterpart of {', '.join(lacking[:3])}; give the target's tensors as `into`"
            )
        left = [part.key for part in source.parts if part.key not in taken and part.names[0] in tensors]
        if left and into is None:
            raise ValueError(
                f"the target has no place for {', '.join(left[:3])}; give its tensors as `into` to leave it out"
            )
        if target.ties:
            _even_logits(target, self, out)
        for name, tensor in tensors.items():
            if source.passed and name.endswith(source.passed):
                out[name] = tensor.clone()
        out.update({alias: out[origin] for alias, origin in target.ties if alias in tensors})
        return {name: out[name] for name in (tensors if target is source else out) if name in out}

    def block(self, source: Spaces, part: Part, block: Tensor) -> Tensor:
        """One part of the donor, carried along all its axes."""
        axes = [(number, part.axes[number].space or "", part.axes[number].role) for number in source.order(part)]
        axes = [axis for axis in axes if axis[1] in self.moving]
        # what only changes places needs no offset, and keeps its bits without one
        offset = part.offset if any(role != "e" for _, _, role in axes) else 0.0
        block = block + offset if offset else block
        for number, name, role in axes:
            block = act(self.moving[name], role, block, number, source.within_axis(part, number))
        return block - offset if offset else block

    def _completed(self, target: Spaces, part: Part, block: Tensor, into: Mapping[str, Tensor] | None) -> Tensor:
        """The block with the target's own numbers at units that no donor unit corresponds to."""
        for number in target.order(part):
            name = part.axes[number].space or ""
            none = missing(self.maps[name]) if name in self.maps else None
            if none is None:
                continue
            if into is None:
                raise ValueError(
                    f"{int(none.sum())} units of '{name}' have no counterpart; give the target's tensors as `into`"
                )
            copies, shape = target.within_axis(part, number), [1] * block.dim()
            shape[number] = none.shape[-1]
            if copies is not None:
                shape[copies] = none.shape[0]
                none = none if copies < number else none.mT
            block = torch.where(none.reshape(shape).to(block.device), part.read(into).to(block), block)
        return block

    def lacking(self, tensors: Mapping[str, Tensor]) -> Lacking:
        """What of the target does not come from the donor's tensors, and what of the donor the target has no place
        for, by the keys of parts and the names of spaces."""
        source = self.source.of(tensors)
        kept, taken = dict(self.kept), set()
        for part in self.target.parts:
            donor = None if part.key in kept else _counterpart(source, part)
            if donor is not None and all(name in tensors for name in donor.names):
                taken.add(donor.key)
            elif not part.optional:
                kept.setdefault(part.key, "the donor has no such part")
        units = {}
        for name, map in self.maps.items():
            none = missing(map)
            if none is not None:
                units[name] = int(none.sum())
        left = [part.key for part in source.parts if part.key not in taken and part.names[0] in tensors]
        return Lacking(kept, units, tuple(key for key in left if key not in kept))

    def after(self, first: Maps) -> Maps:
        """`first`, then these."""
        maps: dict[str, Map] = {}
        for name in dict.fromkeys([*first.maps, *self.maps]):
            outer = first.source.by_name[name].within
            earlier = first.maps.get(name)
            if earlier is not None and outer is not None and outer in self.maps:
                moved = self.maps[outer]
                assert isinstance(moved, Index), "copies of a space are counted, so their order is an index"
                earlier = reorder(earlier, moved.index)
            later = self.maps.get(name)
            both = after(later, earlier) if later is not None and earlier is not None else later or earlier
            assert both is not None
            maps[name] = both
        return Maps(first.source, self.target, maps, {**first.kept, **self.kept})

    def inverse(self) -> Maps:
        """From the target's units back to the donor's, for maps that are symmetries."""
        maps: dict[str, Map] = {}
        for name, map in self.maps.items():
            if self._resized(name):
                raise ValueError(f"space '{name}' has other sizes in donor and target, and its map cannot be undone")
            maps[name] = inverse(map)
        for name, map in maps.items():
            outer = self.source.by_name[name].within
            if outer is not None and outer in maps:
                moved = maps[outer]
                assert isinstance(moved, Index), "copies of a space are counted, so their order is an index"
                maps[name] = reorder(map, moved.index)
        return Maps(self.target, self.source, maps)

    def save(self, path: str | Path) -> None:
        """One safetensors file: the maps, with both tables of spaces in its header."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, map in self.maps.items():
            if isinstance(map, Index):
                tensors[f"{name}/index"] = map.index.contiguous()
                if map.scale is not None:
                    tensors[f"{name}/scale"] = map.scale.contiguous()
            elif isinstance(map, Matrix):
                tensors[f"{name}/write"] = map.write.contiguous()
                tensors[f"{name}/read"] = map.read.clone().contiguous()  # safetensors refuses shared memory
                if isinstance(map, Plan):
                    tensors[f"{name}/even"] = map.even.clone().contiguous()
            else:
                tensors[f"{name}/turn"] = torch.view_as_real(map.turn.resolve_conj()).contiguous()
        tables = {"source": self.source.to_json(), "target": self.target.to_json()}
        save_file(tensors, path, {**tables, "kept": json.dumps(dict(self.kept))})

    @staticmethod
    def load(path: str | Path) -> Maps:
        """What `save` wrote."""
        from safetensors import safe_open

        maps: dict[str, Map] = {}
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "source" not in header or "target" not in header:
                raise ValueError(f"{path} holds no maps: its header lacks the tables of spaces")
            source, target = Spaces.from_json(header["source"]), Spaces.from_json(header["target"])
            # copies, since how a matrix lies in memory decides how products are rounded
            held = {key: file.get_tensor(key).clone() for key in file.keys()}
        for key, tensor in held.items():
            name, _, field = key.rpartition("/")
            if field == "index":
                maps[name] = Index(tensor, held.get(f"{name}/scale"))
            elif field == "write":
                read, even = held[f"{name}/read"], held.get(f"{name}/even")
                maps[name] = Matrix(tensor, read) if even is None else Plan(tensor, read, even)
            elif field == "turn":
                maps[name] = Turn(torch.view_as_complex(tensor))
        ordered = {space.name: maps[space.name] for space in source.spaces if space.name in maps}
        return Maps(source, target, ordered, json.loads(header.get("kept", "{}")))


def _counterpart(source: Spaces, part: Part) -> Part | None:
    """The donor's part of that key; for a head of its own the embeddings, where the donor's head is tied to them."""
    found = source.by_key.get(part.key)
    if found is None and part.key == "head.weight":
        embed = source.by_key["embed.weight"]
        if any(origin == embed.names[0] for _, origin in source.ties):
            return replace(embed, axes=part.axes, factor=1.0)  # the head reads what the embeddings write
    return found


def _even_logits(target: Spaces, maps: Maps, out: dict[str, Tensor]) -> None:
    """The norm before a tied head times donor over target width, since the head reads with what writes, which shares
    out nothing, and over what the embeddings were multiplied by."""
    own, other = target.by_key.get("embed.weight"), maps.source.by_key.get("embed.weight")
    if own is None or other is None or own.key in maps.kept:
        return
    share = other.axes[-1].size / own.axes[-1].size * own.factor / other.factor
    last = "norm" if "norm.gain" in target.by_key else "transform.norm"
    for key in (f"{last}.gain", f"{last}.bias"):
        part = target.by_key.get(key)
        if share != 1 and part is not None and part.names[0] in out and key not in maps.kept:
            out[part.names[0]] = (out[part.names[0]] + part.offset) * share - part.offset


def _role(role: str) -> str:
    return {"w": "a writer", "r": "a reader", "e": "element by element"}.get(role, "no part")
