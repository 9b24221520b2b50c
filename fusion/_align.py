"""The work of the step `align`: two checkpoints become tensors with their spaces, maps, and a checkpoint again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion import words
from fusion._features import Features, paired
from fusion._whole import read_whole, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.maps import Maps
    from alignment.spaces import Spaces
    from alignment.vocab import VocabMap
    from fusion.checkpoint import Source
    from fusion.job import Job

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
    vocab: VocabMap | None = None  # the donor's tokens into the target's, where they are not the same

    @property
    def deeper(self) -> bool:
        """Whether the two differ in their number of layers."""
        from alignment.layers import layer_types

        return len(layer_types(self.target.spaces)) != len(layer_types(self.donor.spaces))

    @property
    def config(self) -> dict[str, Any]:
        """The output's configuration: the target's, its head untied where that was asked."""
        untied = self.folded and self.target.config.get("tie_word_embeddings") is False
        return {**self.target.source.config, **({"tie_word_embeddings": False} if untied else {})}


def pair_of(
    job: Job, target: str, donor: str, untie: bool, only: Sequence[str] | None = None, *, text: bool = False
) -> Pair:
    """Both networks, read, in which nothing moves but the spaces called like one of `only` (None: all).

    Raises ValueError where their tokens are not the same, unless the networks are compared on `text`, and for spaces
    of other sizes that are to stay.
    """
    from alignment import find_family

    sources = {name: job.source(name) for name in dict.fromkeys((target, donor))}
    vocab = _other_tokens(job, sources[target], sources[donor], target, donor, text)
    spaces = {name: find_family(source.config, frozenset(source.entries)) for name, source in sources.items()}
    if vocab is None:
        same_rows(spaces[target], spaces[donor], (target, donor), job.place)
    tied = any(one.ties for one in spaces.values())
    if untie and not spaces[target].ties:
        raise ValueError(f"{job.place}.untie: the head of {target} is not tied")
    turns = only is None or spaces[target].only(only).by_name["residual"].group != "fixed"
    folded = untie or (turns and not tied and all(grows(sources[name].config, one) for name, one in spaces.items()))
    sides = [
        side(name, sources[name], read_whole(sources[name]), spaces[name], folded, only) for name in (target, donor)
    ]
    for space in sides[0].spaces.spaces if only is not None else ():
        other = sides[1].spaces.by_name.get(space.name)
        if space.group == "fixed" and other is not None and other.size != space.size and space.name != "vocabulary":
            raise ValueError(
                f"{job.place}.spaces: '{space.name}' is not among them, and cannot stay as it is: it has {space.size} "
                f"units in {target} and {other.size} in {donor}"
            )
    return Pair(sides[0], sides[1], folded, vocab)


def grows(config: Mapping[str, Any], spaces: Spaces) -> bool:
    """Whether the stream of such a network has more symmetries once norm gains are folded."""
    from alignment import find_family
    from alignment.families._table import FOLDED

    folded = find_family({**config, FOLDED: True}).by_name["residual"] if spaces.norms else None
    return folded is not None and folded.group != spaces.by_name["residual"].group


def side(
    name: str,
    source: Source,
    stored: dict[str, Tensor],
    spaces: Spaces,
    folded: bool,
    only: Sequence[str] | None = None,
) -> Side:
    """A network of these tensors, in which nothing moves but the spaces called like one of `only` (None: all)."""
    from alignment import find_family, fold

    tensors, config = stored, source.config
    if folded:
        tensors, config = fold(stored, source.config, untie=bool(spaces.ties))
        spaces = find_family(config, frozenset(tensors))
    return Side(name, source, stored, tensors, config, spaces if only is None else spaces.only(only))


def _other_tokens(
    job: Job, target: Source, donor: Source, target_name: str, donor_name: str, text: bool
) -> VocabMap | None:
    """Which tokens have the same bytes, where both networks have tokenizers that differ; else None: rows correspond by
    number. ValueError for those that differ where no text is there to compare the networks on."""
    from tokenizers import Tokenizer

    from alignment.vocab import VocabMap

    files = [source.path / "tokenizer.json" for source in (donor, target)]
    if not all(file.is_file() for file in files):
        return None
    other, one = (Tokenizer.from_file(str(file)) for file in files)
    if one.get_vocab() == other.get_vocab():
        return None
    if not text:
        raise ValueError(
            f"{job.place}: {target_name} and {donor_name} have other tokens, {one.get_vocab_size()} and "
            f"{other.get_vocab_size()}; give the donor the target's first: retokenize: {{out: ..., model: "
            f"{donor_name}, base: {target_name}}}, or compare them on text (features: activations) and keep the "
            "target's embeddings and head"
        )
    return VocabMap.exact(other, one)


def same_rows(target: Spaces, donor: Spaces, names: tuple[str, str], place: str) -> None:
    """ValueError where two vocabularies that correspond row by row have other sizes."""
    sizes = [one.by_name["vocabulary"].size for one in (target, donor) if "vocabulary" in one.by_name]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{place}: {names[0]} has {sizes[0]} tokens and {names[1]} {sizes[1]}; without tokenizers, rows "
            "correspond by number and there must be as many; with them, give the donor the target's first: "
            f"retokenize: {{out: ..., model: {names[1]}, base: {names[0]}}}, or compare them on text (features: "
            "activations) and keep the target's embeddings and head"
        )


def likeness(job: Job, pair: Pair, data: str | None) -> dict[int, int]:
    """The donor's layer of each target layer that has one, by linear CKA of their states on the same bytes."""
    import torch

    from alignment.layers import LinearCKA, match_layers, types_of_both
    from fusion import sources

    types = types_of_both(pair.target.spaces, pair.donor.spaces)
    if data is None:
        raise ValueError(
            f"{job.place}: {pair.target.name} has {len(types[0])} layers and {pair.donor.name} {len(types[1])}; give "
            "data, on which layers are compared"
        )
    found = LinearCKA()
    models = [sources.load_model(job.model(side.name), device=job.device) for side in (pair.target, pair.donor)]
    for batch in paired(job, pair, data, "layers compared", least=4):
        both = (models[0], batch.target, batch.target_rows), (models[1], batch.donor, batch.donor_rows)
        with torch.no_grad():
            states = [
                [one[0, rows].cpu() for one in model(**given, output_hidden_states=True).hidden_states[1:]]
                for model, given, rows in both
            ]
        found.add(*states)
    layers = match_layers(found.similarity(), gap=GAP, types=types)
    if not layers:
        raise ValueError(f"{job.place}: no layer of {pair.donor.name} corresponds to one of {pair.target.name}")
    return layers


def aligned(
    pair: Pair,
    word: str,
    params: Mapping[str, Any],
    layers: Mapping[int, int] | None,
    sweeps: int,
    seed: int,
    features: Features,
    found: Maps | None = None,
) -> tuple[Maps, dict[str, Tensor]]:
    """The maps, unless they are `found` already, and the donor in the target's units, with its gains and dtypes."""
    from alignment import align, unfold

    target, donor = pair.target, pair.donor
    function = words.load("match", word)
    match = partial(function, **params) if params else function
    maps = found or align(
        *(target.tensors, donor.tensors, target.spaces, donor.spaces),
        features=features.tables,
        match=match,
        vocab=pair.vocab,
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
    write_whole(job, job.directory, tensors, pair.config, pair.target.source, shard_size)
