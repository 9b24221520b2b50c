"""Units kept apart: a network of several that is wider where they disagree most (PLeaS, Nasery et al. 2024,
arXiv:2407.02447).

The published search for a width of each layer under a FLOP budget is a quadratic programme; here units go apart one by
one, that with the most disagreement for its price first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alignment.features.activations import Moments, activations, moments
from alignment.repair import run
from alignment.spaces import Part, Spaces
from alignment.zip import joined, zippable

__all__ = ["keep_apart", "likeness", "partly", "spend"]

EQUAL = 1e-6  # of a correlation: units that differ by less have no need of each other
LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def partly(
    module: nn.Module,
    spaces: Spaces,
    networks: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Any],
    *,
    flops: float = 1.5,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module with at most `flops` times the multiplications of one network, and the merged unit of each network's
    units by space (k n), as `least_squares` takes them.

    `networks` are tensors for `module`, aligned. Units of which there is one are means, units apart their network's
    own, read as the mean of the networks reads them. Raises ValueError for a budget out of range, and where a wider
    layer would need other than linear layers, convolutions without groups and BatchNorm.
    """
    if not 1 <= flops <= len(networks) ** 2:
        raise ValueError(
            f"apart: flops is {flops:g}; 1 is one network, and {len(networks) ** 2} all units of all apart"
        )
    copies = [copy.deepcopy(module) for _ in networks]
    for one, tensors in zip(copies, networks):
        one.load_state_dict(dict(tensors))
    found = [moments(copies[0], other, spaces, spaces, batches) for other in copies[1:]]
    free = [name for name in zippable(spaces) if name in found[0]]
    alike = {name: likeness([one for many in found for one in many[name]]) for name in free}
    apart = spend(spaces, alike, _positions(copies[0].eval(), spaces, batches[0]), flops, len(networks))
    groups = {name: keep_apart(alike[name], count, len(networks)) for name, count in apart.items() if count}
    sizes = {name: int(unit.max()) + 1 for name, unit in groups.items()}
    wide = joined(spaces, networks, groups, into=_sized(spaces, sizes))
    return _wider(module, wide), groups


def likeness(pairs: Sequence[Moments]) -> Tensor:
    """(n,) mean correlations of units with their counterparts; 1 where neither ever varies."""
    found = [torch.where(one.dead[0] & one.dead[1], 1.0, activations(one).diagonal()) for one in pairs]
    return torch.stack(found).mean(0).cpu()


def keep_apart(alike: Tensor, apart: int, models: int) -> Tensor:  # (n,)
    """int64 (k n): unit i of all networks is merged unit i, but for the `apart` least alike ones: of these the first
    network has unit i, and the others one of their own after the n units."""
    n = len(alike)
    alone = alike.argsort()[:apart].sort().values
    groups = torch.arange(n).repeat(models, 1)
    for number in range(1, models):
        groups[number, alone] = n + (number - 1) * apart + torch.arange(apart)
    return groups.flatten()


def spend(
    spaces: Spaces,
    alike: Mapping[str, Tensor],  # by space (n,), 1 for units that agree
    positions: Mapping[str, int],  # by tensor how often its layer is applied to a sample
    flops: float,
    models: int = 2,
) -> dict[str, int]:
    """How many units of each space go apart within `flops` times the multiplications of one network: greedily those
    with the most disagreement, 1 - alike, for what they cost beside the units that are apart already."""
    layers = [part for part in spaces.parts if part.names[0] in positions]
    order = {
        name: [value for value in (1 - one).sort(descending=True).values.tolist() if value > EQUAL]
        for name, one in alike.items()
    }
    apart = dict.fromkeys(alike, 0)

    def cost() -> float:
        grown = {name: (models - 1) * count for name, count in apart.items()}
        return sum(
            positions[part.names[0]] * math.prod(axis.size + grown.get(axis.space or "", 0) for axis in part.axes)
            for part in layers
        )

    budget, spent = flops * cost(), cost()
    while True:
        best, price, gain = "", 0.0, 0.0
        for name, left in order.items():
            if apart[name] == len(left):
                continue
            apart[name] += 1
            more = cost()
            apart[name] -= 1
            if more <= budget and left[apart[name]] / (more - spent) > gain:
                best, price, gain = name, more, left[apart[name]] / (more - spent)
        if not best:
            return apart
        apart[best] += 1
        spent = price


def _positions(module: nn.Module, spaces: Spaces, batch: Any) -> dict[str, int]:
    """By weight how often it is applied to one sample, in all places that share it."""
    found: dict[str, int] = {}
    origin = dict(spaces.ties)
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, LAYERS):

            def seen(one: nn.Module, _: Any, out: Tensor, name: str = name) -> None:
                units = out.shape[-1] if isinstance(one, nn.Linear) else out.shape[1]
                weight = origin.get(f"{name}.weight", f"{name}.weight")
                found[weight] = found.get(weight, 0) + out.numel() // (units * len(out))

            hooks.append(layer.register_forward_hook(seen))
    run(module, [batch])
    for hook in hooks:
        hook.remove()
    return found


def _sized(spaces: Spaces, sizes: Mapping[str, int]) -> Spaces:
    """The table with other sizes of some spaces."""
    return replace(
        spaces,
        spaces=tuple(replace(space, size=sizes.get(space.name, space.size)) for space in spaces.spaces),
        parts=tuple(_sized_part(part, sizes) for part in spaces.parts),
        config="",
    )


def _sized_part(part: Part, sizes: Mapping[str, int]) -> Part:
    if not any(axis.space in sizes for axis in part.axes):
        return part
    if part.take or len(part.names) > 1:
        raise ValueError(f"apart: {part.names[0]} holds several parts side by side, and cannot grow in one of them")
    axes = tuple(replace(axis, size=sizes.get(axis.space or "", axis.size)) for axis in part.axes)
    shape, left = [], list(zip(part.axes, axes))
    for stored in part.shape:
        own = grown = 1
        while own < stored:
            before, after = left.pop(0)
            own, grown = own * before.size, grown * after.size
        shape.append(grown)
    return replace(part, shape=tuple(shape), grid=tuple(axis.size for axis in axes), axes=axes)


def _wider(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with these tensors, whatever their sizes."""
    made = copy.deepcopy(module)
    grown: dict[int, nn.Parameter] = {}  # by the parameter before, which several layers may share
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        owner, held = made.get_submodule(stem), made.state_dict()[name]
        if held.shape == tensor.shape:
            continue
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = tensors[f"{stem}.weight"].shape
        elif isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d) and owner.groups == 1:
            owner.out_channels, owner.in_channels = tensors[f"{stem}.weight"].shape[:2]
        elif isinstance(owner, _BatchNorm):
            owner.num_features = len(tensor)
        else:
            raise ValueError(f"apart: {name} would be {tuple(tensor.shape)}, and a {type(owner).__name__} cannot grow")
        if leaf in dict(owner.named_parameters(recurse=False)):
            shared = grown.setdefault(id(made.get_parameter(name)), nn.Parameter(torch.empty_like(tensor)))
            owner.register_parameter(leaf, shared)
        else:
            owner.register_buffer(leaf, torch.empty_like(tensor))
    made.load_state_dict(dict(tensors))
    return made
