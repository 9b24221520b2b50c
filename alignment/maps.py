"""One network in another's units: the maps of all spaces, checked, applied, saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Turn, act, after, inverse, reorder, still
from alignment._groups import why_not
from alignment.spaces import Part, Spaces

__all__ = ["Index", "Map", "Maps", "Matrix", "Turn"]

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Maps:
    """From the donor's spaces `source` to the target's: a map by space name; a space without one stays as it is."""

    source: Spaces
    target: Spaces
    maps: Mapping[str, Map]

    @cached_property
    def moving(self) -> dict[str, Map]:
        """The maps that are not the identity."""
        return {name: map for name, map in self.maps.items() if not still(map)}

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
            donor = _counterpart(source, part)
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
            block = self.block(source, donor, read.float() if dtype in HALF else read).to(dtype)
            for name, piece in zip(part.names, block.unbind(0) if len(part.names) > 1 else [block]):
                if name not in out:
                    out[name] = into[name].clone() if into is not None else piece.new_empty(_stored(part, piece))
            _write(part, block, out)
        if lacking:
            raise ValueError(
                f"the donor has no counterpart of {', '.join(lacking[:3])}; give the target's tensors as `into`"
            )
        left = [part.key for part in source.parts if part.key not in taken and part.names[0] in tensors]
        if left and into is None:
            raise ValueError(
                f"the target has no place for {', '.join(left[:3])}; give its tensors as `into` to leave it out"
            )
        for name, tensor in tensors.items():
            if source.passed and name.endswith(source.passed):
                out[name] = tensor.clone()
        out.update({alias: out[origin] for alias, origin in target.ties if alias in tensors})
        return {name: out[name] for name in (tensors if target is source else out)}

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
        return Maps(first.source, self.target, maps)

    def inverse(self) -> Maps:
        """From the target's units back to the donor's, for maps that are symmetries."""
        maps = {name: inverse(map) for name, map in self.maps.items()}
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
            else:
                tensors[f"{name}/turn"] = torch.view_as_real(map.turn.resolve_conj()).contiguous()
        save_file(tensors, path, {"source": self.source.to_json(), "target": self.target.to_json()})

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
                maps[name] = Matrix(tensor, held[f"{name}/read"])
            elif field == "turn":
                maps[name] = Turn(torch.view_as_complex(tensor))
        return Maps(source, target, {space.name: maps[space.name] for space in source.spaces if space.name in maps})


def _counterpart(source: Spaces, part: Part) -> Part | None:
    """The donor's part of that key; for a head of its own the embeddings, where the donor's head is tied to them."""
    found = source.by_key.get(part.key)
    if found is None and part.key == "head.weight":
        embed = source.by_key["embed.weight"]
        if any(origin == embed.names[0] for _, origin in source.ties):
            return replace(embed, axes=part.axes)  # the head reads what the embeddings write
    return found


def _stored(part: Part, block: Tensor) -> tuple[int, ...]:
    """The stored shape of one of a part's tensors; a length that only the donor's tensor knows comes from its block."""
    if -1 not in part.shape:
        return part.shape
    lead = 1 if len(part.names) > 1 else 0
    known = block.shape[[axis.size for axis in part.axes].index(-1) - lead]
    return tuple(known if size == -1 else size for size in part.shape)


def _write(part: Part, block: Tensor, out: dict[str, Tensor]) -> None:
    if len(part.names) == 1:
        part.view(out[part.names[0]]).copy_(block)
        return
    assert not part.take, "a tensor of a stack is one part"
    for name, piece in zip(part.names, block.unbind(0)):
        out[name].copy_(piece.reshape(out[name].shape))


def _role(role: str) -> str:
    return {"w": "a writer", "r": "a reader", "e": "element by element"}.get(role, "no part")
