"""Units described by what they do: two checkpoints read the same bytes, and are compared where both end a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from fusion import words
from fusion._blocks import token_numbers
from fusion._progress import Progress
from fusion.data import Document, Encoded, encode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignment.features.activations import Moments
    from alignment.features.activations import Pair as Batch
    from alignment.spaces import Spaces
    from fusion._align import Pair, Side
    from fusion.job import Job

TOKENS = 16384  # after which no more text is read
LOOKS = 2048  # tokens whose attention is compared: a document of n tokens has n * n numbers a head
BATCH = 256  # tokens of one text


@dataclass(frozen=True)
class Features:
    """Similarities by space, target by donor, the tokens behind them, and how many units of each never vary."""

    word: str
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    dead: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def described(
    job: Job,
    pair: Pair,
    given: str | dict[str, Any],
    data: str | None,
    layers: Mapping[int, int] | None,
    memory: float = math.inf,
) -> Features:
    """What `align` matches by; of activations those of every space that a linear layer reads and that may move.

    Sums that take more than `memory` bytes are made in several passes over the data, and tables beyond it lie on disk.

    Raises ValueError where no data are given, for fewer tokens than units, for spaces all of whose units are dead and
    for activations that are not finite.
    """
    from alignment.features.activations import mean_of, streamed

    word, params = words.parse("features", given, f"{job.place}.features")
    if word == "weights":
        return Features(word)
    if data is None:
        raise ValueError(f"{job.place}: features '{word}' are read off data; give: data")
    (target, one), (donor, other) = (_module(job, side, pair.folded) for side in (pair.target, pair.donor))
    if layers is not None:
        other = other.relabel({source: number for number, source in layers.items()})
    function = partial(words.load("features", word), **params)
    turning = partial(words.load("features", "activations"), kind="product")
    stay = {space.name for space in pair.target.spaces.spaces if space.group == "fixed"}
    tables: dict[str, Tensor] = {}
    dead: dict[str, tuple[int, int]] = {}
    tokens = 0
    again = partial(paired, job, pair, data, "activations")
    for name, places in groupby(streamed(target, donor, one, other, again, memory, stay), itemgetter(0)):
        turns = pair.target.spaces.by_name[name].group.startswith("orthogonal")
        seen: list[Seen] = []
        table = mean_of(_looked(turning if turns else function, (found for _, found in places), seen)).float().cpu()
        tables[name] = table if sum(map(_size, tables.values())) + _size(table) <= memory else _on_disk(job, table)
        dead[name] = _dead(job, pair, data, name, seen)
        tokens = max(tokens, *(count for count, _ in seen))
    if not tables:
        raise ValueError(f"{job.place}.features: no linear layer reads a space of {pair.target.name} that may move")
    return Features(word, tables | _heads(job, pair, data, layers, (target, donor)), tokens, dead)


Seen = tuple[int, list["Tensor"]]  # how many samples at a place, and which units of both networks vary there nowhere


def _looked(function: Callable[[Moments], Tensor], places: Iterable[Moments], seen: list[Seen]) -> Iterator[Tensor]:
    """The similarities at each place, what else is asked of it added to `seen`."""
    for one in places:
        seen.append((one.count, one.dead))
        yield function(one)


def _size(table: Tensor) -> int:
    return table.numel() * table.element_size()


def _on_disk(job: Job, table: Tensor) -> Tensor:
    """The same table in a file without a name, from which the system reads what is asked for."""
    import torch

    with NamedTemporaryFile(dir=job.directory) as file:
        held = torch.from_file(file.name, shared=True, size=table.numel(), dtype=table.dtype).view(table.shape)
    return held.copy_(table)


def _heads(
    job: Job, pair: Pair, data: str, layers: Mapping[int, int] | None, modules: tuple[Any, Any]
) -> dict[str, Tensor]:
    """By space of heads that may move, or whose query heads may, how alike their attention is: (K, G, K', G')."""
    import torch

    from alignment.features._patterns import Patterns

    tables = [{space.name: space for space in side.spaces.spaces} for side in (pair.target, pair.donor)]
    both = {}
    for name in tables[0]:
        layer, _, last = name.rpartition(".")
        number = int(layer.rpartition(".")[2]) if last == "kv" else -1
        other = number if layers is None else layers.get(number, -1)
        free = last == "kv" and any(tables[0][one].group != "fixed" for one in (name, f"{layer}.q"))
        if free and other >= 0 and f"layers.{other}.kv" in tables[1]:
            both[name] = number, other
    found = {name: Patterns() for name in both}
    for module in modules:
        module.set_attn_implementation("eager")
    for batch in paired(job, pair, data, "attention", tokens=LOOKS) if both else ():
        with torch.no_grad():
            one, other = (
                module(**given, output_attentions=True).attentions
                for module, given in zip(modules, (batch.target, batch.donor))
            )
        assert batch.target_rows is not None and batch.donor_rows is not None
        for name, (own, its) in both.items():
            found[name].update(one[own][0].cpu(), other[its][0].cpu(), batch.target_rows, batch.donor_rows)
    shapes = [
        (tables[0][name].size, tables[0][name.replace(".kv", ".q")].size)
        + (tables[1][f"layers.{its}.kv"].size, tables[1][f"layers.{its}.q"].size)
        for name, (_, its) in both.items()
    ]
    return {name: found[name].similarity().float().view(shape) for name, shape in zip(both, shapes)}


def _dead(job: Job, pair: Pair, data: str, name: str, seen: list[Seen]) -> tuple[int, int]:
    """How many units vary nowhere, in the target and in the donor; ValueError where too little is known."""
    import torch

    count, most = seen[0][0], max(len(one) for one in seen[0][1])
    if count < most:
        raise ValueError(
            f"{job.place}.data: {count} tokens of {data} cannot tell {most} units of '{name}' apart; give at least "
            "one for each"
        )
    dead = [torch.stack([where[side] for _, where in seen]).all(0) for side in (0, 1)]
    for side, units in zip((pair.target, pair.donor), dead):
        if bool(units.all()):
            raise ValueError(f"{job.place}.data: all units of '{name}' in {side.name} are dead: none varies on {data}")
    return int(dead[0].sum()), int(dead[1].sum())


def _module(job: Job, side: Side, folded: bool) -> tuple[nn.Module, Spaces]:
    """The network as it is aligned, gains folded where that is so, with its spaces in the names of its module."""
    import torch

    from alignment import find_family, fold
    from fusion import sources

    module = sources.load_model(job.model(side.name), device=job.device)
    names, config = frozenset(module.state_dict()), side.source.config
    if folded:
        tensors, config = fold(module.state_dict(), config, untie=bool(find_family(config, names).ties))
        with torch.no_grad():
            for name, parameter in module.named_parameters():  # a tied head's is the embeddings'
                parameter.copy_(tensors[name])
    return module, find_family(config, names)


def paired(job: Job, pair: Pair, data: str, said: str, least: int = 1, tokens: int = TOKENS) -> Iterator[Batch]:
    """Documents as inputs of both networks, with the positions at which a token of each ends at the same byte.

    Nothing but text counts, so neither start tokens nor templates; documents with fewer than `least` such positions are
    left out. Raises ValueError where none is left.
    """
    import torch

    from alignment.features.activations import Pair as Batch
    from alignment.tokens import shared_boundaries

    tokenizers = _tokenizers(job, pair)
    limit = min([BATCH, *(_positions(side.source.config) for side in (pair.target, pair.donor))])
    bar: Progress[int] = job.progress(tokens, said)
    with bar:
        for document in job.documents(data):
            both = [encode(tokenizer, document) for tokenizer in tokenizers] or [
                _numbered(job, pair, data, document)
            ] * 2
            rows = shared_boundaries(*(one.ends[:limit] for one in both))
            if len(rows[0]) < least:
                continue
            one, other = (
                {"input_ids": torch.from_numpy(one.ids[:limit])[None].to(job.device), "use_cache": False}
                for one in both
            )
            yield Batch(one, other, *map(torch.from_numpy, rows))
            bar.advance(len(rows[0]))
            if bar.done >= tokens:
                break
    if not bar.done:
        raise ValueError(
            f"{job.place}.data: no document of {data} has {least} places where tokens of both {pair.target.name} and "
            f"{pair.donor.name} end"
        )


def _tokenizers(job: Job, pair: Pair) -> list[Any]:
    """Of target and donor; one without a tokenizer takes the other's, since rows then correspond by number. None where
    neither has one."""
    from fusion import sources

    folders = [job.model(side.name) for side in (pair.target, pair.donor)]
    having = [folder for folder in folders if (Path(folder) / "tokenizer.json").is_file()]
    return [sources.load_tokenizer(folder if folder in having else having[0]) for folder in folders if having]


def _numbered(job: Job, pair: Pair, data: str, document: Document) -> Encoded:
    """A text of token numbers, each of which ends where it ends for the other network."""
    import numpy as np

    ids = token_numbers(job, pair.target.source.config, data, document)
    return Encoded(ids, np.arange(1, len(ids) + 1), np.ones(len(ids), bool))


def _positions(config: Mapping[str, Any]) -> int:
    found = [config[name] for name in ("max_position_embeddings", "n_positions") if config.get(name)]
    return int(found[0]) if found else BATCH
