"""A network in training merged with checkpoints on disk where its weights lie: no shard is gathered.

Each rank reads of the checkpoints what it holds of the network; statistics add up over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion._method import Method, Region
from fusion._params import depths, layer_of
from fusion._regions import refuse_nan
from fusion.checkpoint import Source
from fusion.online._agree import agreed
from fusion.online._reduce import statistics
from fusion.online.layouts import Layout, Piece, layout
from fusion.online.vectors import checked_region

CHUNK = 1 << 18  # elements merged at once


@torch.no_grad()
def merge_into(
    optimizer: Any,  # torch's, or one of DeepSpeed or accelerate around it
    named_parameters: Iterable[tuple[str, Tensor]],
    method: str,
    sources: Sequence[Source],
    *,
    base: Source | None = None,
    weights: Sequence[float] | None = None,  # of the network first, then of the sources; 1 each when left out
    seed: int = 0,
    step: int = 0,  # of training, so that masks are drawn anew
    params: Mapping[str, Any] | None = None,
    apart: bool = False,  # each rank holds a network of its own: all are merged, the first rank's first
) -> None:
    """The network becomes method([network, *sources]), in the weights that the optimizer steps on and in its own.

    Parameters that aren't trained stay. All ranks call it, between two steps. The result is that of `merge_tensors`:
    bit by bit where statistics are integers or none are needed, else to rounding. Raises ValueError, the same on all
    ranks and before any weight has changed, for methods that need whole rows, tensors or the whole model, for
    checkpoints that lack a tensor or can't be read, and for numbers that are not finite: the map runs twice for that.
    """
    networks = dist.get_world_size() if apart else 1
    k = networks + len(sources)
    found, fitted = admitted(method, params or {}, k, based=base is not None, weighted=weights is not None)
    if weights is not None and len(weights) != k:
        raise ValueError(f"{method}: {len(weights)} weights for {k} models; the network's comes first")
    wrappers, named = _unwrapped(optimizer), list(named_parameters)
    held = layout(wrappers[-1], named)
    if held.kind == "zero" and len(wrappers) == 1:
        raise ValueError("give DeepSpeed's optimizer (engine.optimizer): torch's does not reach the model's weights")
    if apart and held.kind != "plain":
        raise ValueError(
            f"networks of several ranks merge where each rank has a whole one, and these lie in {held.kind}"
        )
    read_from = [*((one, "a source") for one in sources), *(((base, "the base"),) if base is not None else ())]
    agreed(lambda: [checked_region(one, what, piece, piece.start) for piece in held.pieces for one, what in read_from])
    stacks = depths(name for name, _ in named)
    concrete = {name: found.resolve(fitted, name, layer_of(name, stacks)) for name, _ in named}
    who = [f"rank {i}" for i in range(networks)] if apart else ["the network"]
    who += [str(one.path) for one, _ in read_from]
    w = torch.ones(k) if weights is None else torch.tensor([float(one) for one in weights])

    def regions(piece: Piece, stats: Mapping[str, Tensor]) -> Iterator[Region]:
        for first in range(0, piece.flat.numel(), CHUNK):
            here = piece.flat[first : first + CHUNK]
            part = Piece(piece.name, piece.shape, piece.start + first, here)
            stop = part.start + here.numel()
            there = [checked_region(one, what, part, stop).to(here.device) for one, what in read_from]
            rows = torch.stack([*(_everyones(here.float()) if apart else [here.float()]), *there])
            refuse_nan(rows, [(one, piece.name) for one in who])
            below, layer = None if base is None else rows[k], layer_of(piece.name, stacks)
            yield Region(
                rows[:k],
                below,
                w.to(here.device),
                piece.name,
                piece.shape,
                layer,
                part.start,
                stats,
                seed=seed,
                step=step,
            )

    def run(write: bool) -> None:
        for piece in held.pieces:
            for region in regions(piece, stats[piece.name]):
                merged = found.call(region, concrete[piece.name]).tensor
                if not bool(torch.isfinite(merged).all()):
                    raise ValueError(f"{method}: '{piece.name}' is not finite after the merge")
                at = region.start - piece.start
                if write:
                    piece.flat[at : at + merged.numel()].copy_(merged)

    stats = statistics(
        found,
        [(piece.name, partial(regions, piece)) for piece in held.pieces],
        list(dict.fromkeys(name for names in held.split.values() for name in names)),
        concrete,
        w,
        device=held.device,
        based=base is not None,
        agreed=agreed,
    )
    agreed(partial(run, write=False))
    agreed(partial(run, write=True), "; weights have changed before that, go on from the last checkpoint")
    _hand_over(held, wrappers, named)


def admitted(
    method: str, params: Mapping[str, Any], k: int, *, based: bool, weighted: bool
) -> tuple[Method, dict[str, Any]]:
    """The method and its parameters; ValueError for one that a network in training can't be merged by."""
    found = Method.of(method)
    fitted = found.check(params, k, base=based, weights=weighted, live=True)
    if found.inputs:
        raise ValueError(f"{method} reads {', '.join(found.inputs)} of each model; a network in training has none")
    if found.scope(fitted) == "model":
        raise ValueError(f"{method} looks at the whole model here (scope: model); shards merge tensor by tensor")
    return found, fitted


def _everyones(here: Tensor) -> list[Tensor]:
    """The same elements of every rank's network."""
    all_of_them = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, here)
    return all_of_them


def _unwrapped(optimizer: Any) -> list[Any]:
    """The optimizer and those inside it, the one that steps last."""
    found = [optimizer]
    while "optimizer" in vars(found[-1]):
        found.append(found[-1].optimizer)
    return found


def _hand_over(held: Layout, wrappers: Sequence[Any], named: Sequence[tuple[str, Tensor]]) -> None:
    """Gives DeepSpeed's model what its fp32 weights have become, as the end of a step does."""
    if held.kind == "zero3":
        zero = next(vars(p)["_z3_optimizer"] for _, p in named if p.requires_grad)
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # whole on every rank, and gathered anew only when given up before
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif held.kind == "zero":
        wrappers[-2].update_lp_params()
