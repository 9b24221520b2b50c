"""Statistics of live tensors, and what else is added up over the ranks of a run, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion._method import Method, Region
from fusion.merge._x import Max, Min, Reading, Running, Sum

TOGETHER = 16  # tensors whose readings are held at once, and travel in one message
Readings = Mapping[str, Reading]
Stats = Mapping[str, Tensor]


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def added_up(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks; the values themselves in a process alone."""
    if not several():
        return dict(values)
    return {name: _over_all(value.clone(), dist.ReduceOp.SUM) for name, value in values.items()}


def _over_all(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """The value over all ranks, on its own device: NCCL, for one, takes no tensors of the CPU."""
    carried = value
    if value.device.type == "cpu" and "cpu:" not in dist.get_backend_config():
        carried = value.to(torch.accelerator.current_accelerator() or "cpu")
    dist.all_reduce(carried, op=operation)
    return carried.to(value.device)


def over_ranks(
    own: Mapping[str, Readings], names: Sequence[str], nothing: Callable[[str], Readings]
) -> dict[str, Readings]:
    """By name the readings over all ranks' parts; `nothing(name)` says what the readings of a part look like."""
    out: dict[str, Readings] = {}
    full = {name: own[name] if name in own else _zero(nothing(name)) for name in names}
    kinds = [(name, s, type(reading)) for name, readings in full.items() for s, reading in readings.items()]
    for kind, operation in ((Sum, dist.ReduceOp.SUM), (Max, dist.ReduceOp.MAX), (Min, dist.ReduceOp.MIN)):
        for floating in (False, True):
            here = [
                (name, s) for name, s, k in kinds if k is kind and full[name][s].value.is_floating_point() is floating
            ]
            if not here:
                continue
            device = full[here[0][0]][here[0][1]].value.device
            flat = torch.cat([_wide(full[name][s].value).flatten().to(device) for name, s in here])
            flat = _over_all(flat, operation)
            sizes = [full[name][s].value.numel() for name, s in here]
            for (name, s), part in zip(here, flat.split(sizes), strict=True):
                shape = full[name][s].value.shape
                out[name] = {**out.get(name, {}), s: kind(part.reshape(shape))}
    return out


def _here(work: Callable[[], Any]) -> Any:
    return work()


def statistics(
    method: Method,
    parts: Sequence[tuple[str, Callable[[Stats], Iterator[Region]]]],
    split: Sequence[str],
    params: Mapping[str, Mapping[str, Any]],
    weights: Tensor,
    *,
    device: torch.device,
    based: bool,
    agreed: Callable[[Callable[[], Any]], Any] = _here,
) -> dict[str, Stats]:
    """By name the settled statistics of each tensor, those of split ones over all ranks.

    parts: what this rank holds, as name and the regions of it given the passes so far. split: names that lie on
    several ranks. params: the method's, by name. device: of tensors that others hold. agreed: runs what may fail.
    """
    stats: dict[str, Stats] = {name: {} for name in [*(name for name, _ in parts), *split]}
    needed = {name: method.needed(params[name]) for name in stats}

    regions_of = dict(parts)

    def own(index: int, some: Sequence[str]) -> dict[str, Readings]:
        readings: dict[str, Readings] = {}
        for name in some:
            if name not in regions_of:
                continue
            running = Running()
            for i, region in enumerate(regions_of[name](stats[name])):
                running.add(i, method.call_pass(index, region, params[name]))
            readings[name] = running.readings()
        return readings

    def settle(readings: Mapping[str, Readings]) -> None:
        for name, found in readings.items():
            values = {one: reading.value for one, reading in found.items()}
            stats[name] = method.settle({**stats[name], **values}, params[name], weights)

    def nothing(index: int, name: str) -> Readings:
        return of_no_part(method, index, params[name], name, stats[name], weights.to(device), based)

    def alone() -> None:
        for name in regions_of:
            for index in range(0 if name in split else needed[name]):
                settle(own(index, [name]))

    agreed(alone)
    for first in range(0, len(split), TOGETHER):  # histograms are large: all passes of a few tensors, then the next
        some = split[first : first + TOGETHER]
        for index in range(max(needed[name] for name in some)):
            here = [name for name in some if index < needed[name]]
            readings = over_ranks(agreed(partial(own, index, here)), here, partial(nothing, index))
            agreed(partial(settle, readings))
    return stats


def of_no_part(
    method: Method,
    index: int,
    params: Mapping[str, Any],
    name: str,
    stats: Mapping[str, Tensor],
    weights: Tensor,
    based: bool,
) -> Readings:
    """What a statistics pass returns on a rank that holds no part of a tensor: of the others' form, on the weights'
    device; the values mean nothing."""
    one = torch.zeros(len(weights), 1, device=weights.device)
    # the shape is larger than the region: a part, as what the other ranks hold
    return method.call_pass(index, Region(one, one[0] if based else None, weights, name, (2,), stats=stats), params)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.long()


def _zero(readings: Readings) -> dict[str, Reading]:
    """Readings of the same form that change nothing."""
    empty: dict[str, Reading] = {}
    for name, reading in readings.items():
        value = reading.value
        if isinstance(reading, Sum):
            empty[name] = Sum(torch.zeros_like(value))
        else:
            bounds = torch.finfo(value.dtype) if value.is_floating_point() else torch.iinfo(value.dtype)
            least = isinstance(reading, Max)
            empty[name] = type(reading)(torch.full_like(value, bounds.min if least else bounds.max))
    return empty
