"""A LoRA adapter on a base model as a Source: W + scale * B A, computed for just the rows that are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion._adapter_files import Adapter, Pair, read_adapter
from fusion.checkpoint import Checkpoint, Entry, region

if TYPE_CHECKING:
    from fusion.checkpoint import Source

TILE = 1 << 14  # elements of a product that is always computed whole, so that what is asked for never changes its bits
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out")


def open_adapter(directory: Path, base: Source | None) -> Adapted:
    """The adapter of a directory on its base; ValueError when there is no base or the two do not go together."""
    if base is None:
        raise ValueError(
            f"{directory} is a PEFT adapter and needs the model it sits on: --base DIR on the command line, "
            f"in a recipe {{path: {directory}, base: NAME}}"
        )
    return Adapted(base, read_adapter(directory))


class Adapted:
    """A base with an adapter applied on the fly: float32 where the adapter changes it, the base's own bytes elsewhere.

    Where the base ties input and output embedding and the adapter changes one of them, they are two tensors here, as
    they are when the adapted model runs.
    """

    def __init__(self, base: Source, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self.path, self.config = adapter.path, dict(base.config)
        self.files = (*base.files, *adapter.files)
        self.entries: dict[str, Entry] = dict(base.entries)
        self._own = Checkpoint.open(adapter.weights)
        self._below: dict[str, str] = {}  # tensor -> the base's tensor it is computed from, where names differ
        saved = self._untied(adapter.replaced)
        prefix = rewriting([*adapter.pairs, *(n.rpartition(".")[0] for n in saved)], self.entries, self.path)
        self._pairs = {prefix(module) + ".weight": pair for module, pair in adapter.pairs.items()}
        self._replaced = {prefix(name): key for name, key in saved.items()}
        for name, key in self._replaced.items():
            self._replace(name, key)
        votes = {self._transposed(name, pair) for name, pair in self._pairs.items() if not pair.embedding} - {None}
        # a square matrix is laid out as the others are; adapter_config.json speaks for one module type of several
        self._square = True in votes if votes else bool(adapter.config.get("fan_in_fan_out"))
        for name in self._pairs:
            entry = self.entries[name]
            if not entry.dtype.is_floating_point:
                raise ValueError(f"{self.path}: {name} of {base.path} is {entry.dtype}; an adapter needs plain floats")
            self.entries[name] = Entry(name, entry.shape, torch.float32, entry.stored)
        self._factors = functools.lru_cache(maxsize=8)(self._load)

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        """Elements [start, stop) of the flattened tensor, in the entry's dtype, into a 1-D buffer of that size."""
        if name not in self._pairs:
            self._beneath(name, start, stop, into)
            return
        plain = torch.empty(stop - start, dtype=self._dtype_beneath(name))
        self._beneath(name, start, stop, plain)
        into.copy_(plain)
        left, right = self._factors(name)
        columns = right.shape[1]
        rows = max(1, TILE // columns)
        for row in range(start // columns // rows * rows, -(-stop // columns), rows):
            update = (left[row : row + rows] @ right).flatten()
            here = row * columns
            a, b = max(start, here), min(stop, here + len(update))
            into[a - start : b - start] += update[a - here : b - here]

    def _dtype_beneath(self, name: str) -> torch.dtype:
        if name in self._replaced:
            return self._own.entries[self._replaced[name]].dtype
        return self.base.entries[self._below.get(name, name)].dtype

    def _beneath(self, name: str, start: int, stop: int, into: Tensor) -> None:
        if name in self._replaced:
            self._own.read(self._replaced[name], start, stop, into)
        else:
            self.base.read(self._below.get(name, name), start, stop, into)

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        """float32 (rows, rank) with the scale in it and (rank, columns): their product is what is added."""
        pair = self._pairs[name]
        a, b = load(self._own, pair.a).flatten(1), load(self._own, pair.b).flatten(1)
        transposed = self._transposed(name, pair)
        if self._square if transposed is None else transposed:
            a, b = b.T.contiguous(), a.T.contiguous()
        return b * pair.scale, a

    def _transposed(self, name: str, pair: Pair) -> bool | None:
        """Whether the weight is (in, out) or, of an embedding, (tokens, width); None for a square one."""
        shape = self.entries[name].shape
        a, b = self._own.entries[pair.a].shape, self._own.entries[pair.b].shape
        inner, outer = math.prod(a[1:]), b[0]
        if len(shape) >= 2 and (shape[0], math.prod(shape[1:])) == (outer, inner) and not pair.embedding:
            return False if outer != inner else None
        if len(shape) == 2 and shape == (inner, outer):
            return True
        raise ValueError(
            f"{self.path}: the factors of {name} have shapes {a} and {b}, the tensor in {self.base.path} is {shape}; "
            "this is not the base that the adapter was trained on"
        )

    def _replace(self, name: str, key: str) -> None:
        """Another number of rows is another vocabulary; any other difference is another base."""
        old, new = self.entries[name], self._own.entries[key]
        if old.shape != new.shape:
            settings = self.config.get("text_config") or self.config
            if old.shape[1:] != new.shape[1:] or settings.get("vocab_size") not in (old.shape[0], new.shape[0]):
                raise ValueError(f"{self.path}: {name} has shape {new.shape}, in {self.base.path} it has {old.shape}")
            grown = {**settings, "vocab_size": new.shape[0]}
            self.config = {**self.config, "text_config": grown} if "text_config" in self.config else grown
        self.entries[name] = Entry(name, new.shape, new.dtype, old.stored)

    def _untied(self, replaced: Mapping[str, str]) -> dict[str, str]:
        """What the adapter replaces, after a tied base got a head of its own if only one user of its embedding changes.

        An embedding that was merely resized is saved under both its names and stays tied.
        """
        heads, embeddings = _ending(self.base.entries, HEADS), _ending(self.base.entries, EMBEDDINGS)
        tied = (self.config.get("text_config") or self.config).get("tie_word_embeddings", not heads)
        if heads or not tied or len(embeddings) != 1:
            return dict(replaced)
        changed = {one.rpartition(".")[2] for one in (*self.adapter.pairs, *self.adapter.config["modules_to_save"])}
        if not changed & {*HEADS, *EMBEDDINGS}:
            return {name: key for name, key in replaced.items() if name not in _ending(replaced, HEADS)}
        named = _ending([*(f"{module}.weight" for module in self.adapter.pairs), *replaced], HEADS)
        head = named[0] if named else "lm_head.weight"
        below = self.base.entries[embeddings[0]]
        self._below[head] = embeddings[0]
        self.entries[head] = Entry(head, below.shape, below.dtype, below.stored)
        self.config["tie_word_embeddings"] = False
        if "text_config" in self.config:
            self.config["text_config"] = {**self.config["text_config"], "tie_word_embeddings": False}
        return dict(replaced)


def _ending(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Those that are the weight of a module of one of these names."""
    return [name for name in names if name.endswith(".weight") and name.split(".")[-2] in modules]


def load(source: Checkpoint, key: str) -> Tensor:
    """A whole tensor of a file in float32, in its shape."""
    return region(source, key).float().reshape(source.entries[key].shape)


class _Prefix:
    """Names with one beginning put in the place of another."""

    def __init__(self, drop: str, add: str):
        self.drop, self.add = drop, add

    def __call__(self, name: str) -> str:
        whole = name in ("lm_head", "lm_head.weight")  # stands beside the body, without its prefix
        return name if whole or not name.startswith(self.drop) else self.add + name[len(self.drop) :]


def rewriting(modules: Iterable[str], entries: Mapping[str, Any], path: Path) -> _Prefix:
    """How an adapter's names become the base's: as they are, or with one prefix more or less for all.

    A base saved as the bare body lacks `model.` or `transformer.`; an adapter trained on the body lacks it as well.
    Raises ValueError naming a module that the base does not have.
    """
    wanted = sorted(set(modules))
    owners = {name.rpartition(".")[0] for name in entries}
    ways = [_Prefix("", "")]
    first = next((m for m in wanted if m not in owners), None)
    if first is not None:
        steps = first.split(".")
        ways += [_Prefix("", o[: -len(first)]) for o in sorted(owners) if o.endswith("." + first)]
        ways += [_Prefix(".".join(steps[:i]) + ".", "") for i in range(1, len(steps))]
    for way in ways:
        if all(way(module) in owners for module in wanted):
            return way
    raise ValueError(
        f"{path}: the base has no module {first}, which the adapter changes; its modules are like "
        f"{min(owners - {''}, key=len, default='none')} ({len(owners)})"
    )
