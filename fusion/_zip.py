"""The work of the step `zip`: correlations of all networks' neurons block by block, one trunk, and own tails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fusion._together import Together, flows, opened, reader_of

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.spaces import Spaces
    from fusion.job import Job

STEM = ("embed.", "position", "token_type.", "cls.", "mask.", "project_in.")  # parts that come before the first layer


@dataclass(frozen=True)
class Zipped:
    """The merged unit of each network's units by space, with the sign that it joins with, and what was merged."""

    groups: dict[str, Tensor]  # (k n) int64
    signs: dict[str, Tensor]  # (k n)
    report: dict[str, Any]


def in_first_units(job: Job, models: Sequence[str], maps: Sequence[str]) -> Together:
    """The networks; those without an align step in `maps` are carried into the first one's units by their weights, with
    heads of other classes than the first one's."""
    import torch

    from alignment import find_family
    from fusion._align import Pair, aligned, grows, side
    from fusion._features import Features

    networks = opened(job, models, maps)
    sources = [job.source(name) for name in networks.names]
    tables = [find_family(one.config, frozenset(own)) for one, own in zip(sources, networks.tensors)]
    folded = not any(one.ties for one in tables) and grows(networks.config, networks.spaces)
    every = list(zip(networks.names, sources, networks.tensors, tables))
    first, tensors = side(*every[0], folded), [networks.tensors[0]]
    for name, source, own, table in every[1:]:
        if name in maps:
            tensors.append(own)
            continue
        heads = {key: torch.zeros_like(one) for key, one in own.items() if one.shape != first.stored[key].shape}
        target = side(*every[0][:2], {**first.stored, **heads}, tables[0], folded) if heads else first
        pair = Pair(target, side(name, source, own, table, folded), folded)
        tensors.append(aligned(pair, "hungarian", {}, None, 5, job.seed, Features("weights"))[1])
    return replace(networks, tensors=tuple(tensors))


def alike(networks: Together) -> Together:
    """The networks with the first one's head in the place of those of other classes."""
    first = networks.tensors[0]
    tensors = (
        {key: t if t.shape == first[key].shape else first[key] for key, t in one.items()} for one in networks.tensors
    )
    return replace(networks, tensors=tuple(tensors))


def zipped(
    job: Job,
    networks: Together,
    data: str,
    until: int,
    alpha: float,
    beta: float,
    tokens: int,
    length: int,
) -> Zipped:
    """Groups of the neurons of layers before `until`, by their correlations on data."""
    batches, running = flows(job, alike(networks), data, tokens, length)
    found = Zipped({}, {}, {"tokens": sum(one["input_ids"].numel() for one in batches)})
    for layer in job.progress(range(until), f"{job.name}: layers"):
        for name in networks.units:
            if name.startswith(f"layers.{layer}."):
                _zip_space(job, networks, running, name, alpha, beta, found)
        for one in running:
            one.advance()
    return found


def _zip_space(
    job: Job, networks: Together, running: Sequence[Any], name: str, alpha: float, beta: float, found: Zipped
) -> None:
    import torch

    from alignment.features.activations import Moments, activations
    from alignment.zip import zip_units

    reader = reader_of(running[0], name)
    moments = Moments(name=f"what {reader} reads")
    for number in range(len(running[0].batches)):
        x = torch.cat([one.inputs(number, [reader])[reader] for one in running], 1)
        moments.update(x, x)
    space, count = networks.spaces.by_name[name], len(running)
    if moments.count < space.size:
        raise ValueError(
            f"{job.place}.data: {moments.count} tokens cannot tell {space.size} units of '{name}' apart; give at least "
            "one for each (tokens says how many are read)"
        )
    table = activations(moments).cpu()
    dead = moments.dead[0].cpu().view(count, space.size).all(0).nonzero()[:, 0]
    both = dead + space.size * torch.arange(count)[:, None]
    table[both[:, None], both[None]] = 1.0  # of what never varies only the weights tell, by which units correspond
    signed = space.group == "scaled permutation"
    groups = zip_units(table.abs() if signed else table, [space.size] * count, space.size, alpha=alpha, beta=beta)
    found.groups[name] = groups
    if signed:
        first = torch.full((space.size,), count * space.size).scatter_reduce(
            0, groups, torch.arange(len(groups)), "amin"
        )
        found.signs[name] = torch.where(table.gather(1, first[groups][:, None])[:, 0] < 0, -1.0, 1.0)
    origin = torch.arange(count).repeat_interleave(space.size)
    members = torch.zeros(space.size, count).index_put((groups, origin), torch.ones(len(groups)), accumulate=True)
    found.report[name] = {
        "units": space.size,
        "dead": len(dead),
        "of_all_networks": int((members > 0).all(1).sum()),
        "of_one_network": int(((members > 0).sum(1) == 1).sum()),
        "merged_within": int((members - 1).clamp_min(0).sum()),
    }


def tail(spaces: Spaces, until: int, keeps: bool) -> set[str]:
    """Names of tensors that stay each network's own: of layers from `until` on, and of the head where it is kept."""
    own: set[str] = set()
    for part in spaces.parts:
        inside = part.key.startswith("layers.")
        if int(part.key.split(".")[1]) >= until if inside else keeps and not part.key.startswith(STEM):
            own.update(part.names)
    return own


def written(job: Job, networks: Together, found: Zipped, until: int, keeps: bool, shard_size: int) -> None:
    """The checkpoint of the zipped network; with own tails that of each: the first one's, others in heads/NAME."""
    from alignment.zip import joined
    from fusion._whole import write_whole

    own = tail(networks.spaces, until, keeps)
    trunk = joined(networks.spaces, alike(networks).tensors, found.groups, signs=found.signs)
    if not own:
        write_whole(job, job.directory, trunk, networks.config, networks.source, shard_size)
        return
    for name, tensors in zip(networks.names, networks.tensors):
        source = job.source(name)
        made, config = {**trunk, **{key: tensors[key] for key in own if key in tensors}}, dict(source.config)
        for alias, origin in networks.spaces.ties:
            if keeps and origin in tensors:  # a tied head is kept as one of its own
                made[alias], config["tie_word_embeddings"] = tensors[origin].clone(), False
        place = job.directory if name == networks.names[0] else job.directory / "heads" / name
        write_whole(job, place, made, config, source, shard_size)
