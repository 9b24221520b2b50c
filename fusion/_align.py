"""The work of the step `align`: two checkpoints become tensors with their spaces, maps, and a checkpoint again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion import words
from fusion.data import encode

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.maps import Maps
    from alignment.spaces import Spaces
    from fusion.checkpoint import Source
    from fusion.job import Job

TOKENS = 16384  # on which layers are compared
BATCH = 256  # tokens of one text that are compared together
GAP = 0.05  # of CKA: what it costs to leave a layer without counterpart


@dataclass(frozen=True)
class Side:
    """One of the two networks: as stored, and as it is aligned (with its gains folded, where that helps)."""

    name: str
    source: Source
    stored: dict[str, Tensor]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    spaces: Spaces


@dataclass(frozen=True)
class Pair:
    """Target and donor."""

    target: Side
    donor: Side
    folded: bool

    @property
    def deeper(self) -> bool:
        """Whether the two differ in their number of layers."""
        from alignment.layers import layer_types

        return len(layer_types(self.target.spaces)) != len(layer_types(self.donor.spaces))


def pair_of(job: Job, target: str, donor: str, untie: bool) -> Pair:
    """Both networks, read; ValueError where their vocabularies are not the same."""
    from alignment import find_family
    from alignment.families._table import FOLDED

    sources = {name: job.source(name) for name in dict.fromkeys((target, donor))}
    _same_tokens(job, sources[target], sources[donor], target, donor)
    spaces = {name: find_family(source.config, frozenset(source.entries)) for name, source in sources.items()}
    tied = any(one.ties for one in spaces.values())
    if untie and not spaces[target].ties:
        raise ValueError(f"{job.place}.untie: the head of {target} is not tied")
    grows = all(
        one.norms
        and find_family({**sources[name].config, FOLDED: True}).by_name["residual"].group
        != one.by_name["residual"].group
        for name, one in spaces.items()
    )
    folded = untie or (grows and not tied)
    sides = [_side(name, sources[name], spaces[name], folded) for name in (target, donor)]
    return Pair(sides[0], sides[1], folded)


def _side(name: str, source: Source, spaces: Spaces, folded: bool) -> Side:
    import torch

    from alignment import find_family, fold

    stored: dict[str, Tensor] = {}
    for key, entry in source.entries.items():
        values = torch.empty(entry.numel, dtype=entry.dtype)
        source.read(key, 0, entry.numel, values)
        stored[key] = values.view(entry.shape)
    if not folded:
        return Side(name, source, stored, stored, source.config, spaces)
    tensors, config = fold(stored, source.config, untie=bool(spaces.ties))
    return Side(name, source, stored, tensors, config, find_family(config, frozenset(tensors)))


def _same_tokens(job: Job, target: Source, donor: Source, *names: str) -> None:
    """ValueError where both have tokenizers and these are not the same; without any, rows correspond by number."""
    from tokenizers import Tokenizer

    files = [source.path / "tokenizer.json" for source in (target, donor)]
    if not all(file.is_file() for file in files):
        return
    one, other = (Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) for file in files)
    if one != other:
        raise ValueError(
            f"{job.place}: {names[0]} and {names[1]} have other tokens, {len(one)} and {len(other)}; give the donor "
            f"the target's first: retokenize: {{out: ..., model: {names[1]}, base: {names[0]}}}"
        )


def likeness(job: Job, pair: Pair, data: str | None) -> dict[int, int]:
    """The donor's layer of each target layer that has one, by linear CKA of their states on the same tokens."""
    import torch

    from alignment.layers import LinearCKA, layer_types, match_layers
    from fusion import sources

    types = layer_types(pair.target.spaces), layer_types(pair.donor.spaces)
    if data is None:
        raise ValueError(
            f"{job.place}: {pair.target.name} has {len(types[0])} layers and {pair.donor.name} {len(types[1])}; give "
            "data, on which layers are compared"
        )
    found, seen = LinearCKA(), 0
    directories = [job.model(side.name) for side in (pair.target, pair.donor)]
    tokenizer = sources.load_tokenizer(directories[0])
    models = [sources.load_model(directory, device=job.device) for directory in directories]
    for document in job.progress(job.documents(data), "layers compared"):
        ids = torch.from_numpy(encode(tokenizer, document).ids[:BATCH])[None].to(job.device)
        if ids.shape[1] < 4:
            continue
        with torch.no_grad():
            states = [model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:] for model in models]
        found.add(*([one[0].cpu() for one in side] for side in states))
        seen += ids.shape[1]
        if seen >= TOKENS:
            break
    if not seen:
        raise ValueError(f"{job.place}.data: no document of {data} has four tokens")
    layers = match_layers(found.similarity(), gap=GAP, types=types)
    if not layers:
        raise ValueError(f"{job.place}: no layer of {pair.donor.name} corresponds to one of {pair.target.name}")
    return layers


def aligned(
    pair: Pair, word: str, params: Mapping[str, Any], layers: Mapping[int, int] | None, sweeps: int, seed: int
) -> tuple[Maps, dict[str, Tensor]]:
    """The maps, and the donor in the target's units, with the target's gains and dtypes."""
    from alignment import align, unfold

    target, donor = pair.target, pair.donor
    function = words.load("match", word)
    match = partial(function, **params) if params else function
    maps = align(
        *(target.tensors, donor.tensors, target.spaces, donor.spaces),
        match=match,
        layers=layers,
        sweeps=sweeps,
        seed=seed,
    )
    carried = maps.carry(donor.tensors, into=target.tensors)
    if pair.folded:
        carried, _ = unfold(carried, target.config, target.stored)
    first = next(one.dtype for one in target.stored.values() if one.is_floating_point())
    return maps, {
        name: one.to(target.stored[name].dtype if name in target.stored else first) for name, one in carried.items()
    }


def written(job: Job, pair: Pair, tensors: Mapping[str, Tensor], shard_size: int) -> None:
    """The checkpoint, with the target's tokenizer and configuration."""
    from fusion._carry import carry
    from fusion.checkpoint import Entry, Writer, layout

    shards = layout([Entry(name, tuple(t.shape), t.dtype, t.dtype) for name, t in tensors.items()], shard_size)
    Writer.create(job.directory, shards)
    writer = Writer(job.directory, shards)
    for name in job.progress(list(tensors), f"{job.name}: tensors"):
        writer.write(name, 0, tensors[name].contiguous().flatten())
    writer.sync()
    writer.close()
    config = dict(pair.target.source.config)
    if pair.folded and pair.target.config.get("tie_word_embeddings") is False:
        config["tie_word_embeddings"] = False
    carry(job.directory, config, shards, pair.target.source, pair.target.source)


def report(pair: Pair, maps: Maps, tensors: Mapping[str, Tensor], layers: Mapping[int, int] | None) -> dict[str, Any]:
    """What came from where: parts and units that stay the target's, parts of the donor left out, each space's match,
    and how far the donor's weights are from the target's, before and after, relative to these."""
    lacking = maps.lacking(pair.donor.tensors)
    spaces = {}
    for space in pair.target.spaces.spaces:
        if space.name in maps.maps:
            spaces[space.name] = _space(maps, space.name)
    found: dict[str, Any] = {
        "folded": pair.folded,
        "from_target": lacking.kept,
        "units_from_target": lacking.units,
        "left_out": list(lacking.left),
        "distance": {"aligned": _distance(pair.target.stored, tensors)},
        "spaces": spaces,
    }
    shapes = [{name: one.shape for name, one in side.stored.items()} for side in (pair.target, pair.donor)]
    if shapes[0] == shapes[1]:
        found["distance"]["naive"] = _distance(pair.target.stored, pair.donor.stored)
    if layers is not None:
        found["layers"] = {str(own): other for own, other in layers.items()}
    return found


def _space(maps: Maps, name: str) -> dict[str, Any]:
    from alignment.maps import Index, Plan
    from alignment.match._plan import quality

    map, own, other = maps.maps[name], maps.target.by_name[name], maps.source.by_name[name]
    found: dict[str, Any] = {"group": own.group, "units": own.size, "donor_units": other.size}
    if isinstance(map, Index):
        found["moved"] = int((map.index != map.index.new_tensor(range(own.size))).sum())
        found["matched"] = float((map.index >= 0).double().mean())
    elif isinstance(map, Plan):
        plan = map.even.flatten(0, -2) / map.even.shape[-2] if map.even.dim() == 2 else map.even[0] / own.size
        told = quality(plan)
        found["matched"] = float((map.even.sum(-1) > 0).double().mean())
        found["marginal_error"] = told.marginal_error
        found["effective_support"] = told.effective_support
        found["largest_share"] = told.largest_share
    return found


def _distance(target: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    names = [name for name, one in target.items() if name in other and one.is_floating_point()]
    apart = sum(float((target[name].float() - other[name].float()).double().square().sum()) for name in names)
    size = sum(float(target[name].float().double().square().sum()) for name in names)
    return (apart / max(size, 1e-300)) ** 0.5
