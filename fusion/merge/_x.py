"""What merge methods share: statistics that add up, task vectors, parameters per model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.merge._radix import (
    bucket,
    high_counts,
    keep_count,
    keep_counts,
    largest,
    low_counts,
    nonzeros,
    ranks,
    threshold,
)
from fusion.merge._sums import BLOCK, gram, row_total, squares, total, tree
from fusion.merge._votes import agreed, agreeing, elect, summed, trimmed, weighted

__all__ = [
    "BLOCK",
    "Max",
    "Min",
    "Outputs",
    "Reading",
    "Running",
    "Sum",
    "agreed",
    "agreeing",
    "bucket",
    "choice",
    "deltas",
    "elect",
    "everything",
    "gram",
    "high_counts",
    "is_embedding",
    "joined",
    "keep_count",
    "keep_counts",
    "largest",
    "lower",
    "low_counts",
    "nonzeros",
    "numbers",
    "per_model",
    "ranks",
    "rescaling",
    "row_total",
    "scaled",
    "squares",
    "summed",
    "threshold",
    "total",
    "tree",
    "trimmed",
    "upper",
    "values",
    "weighted",
]

EMBEDDINGS = ("emb", "wte", "wpe", "word_emb", "patch_emb")


@dataclass(frozen=True)
class Sum:
    """A statistic that adds up over the parts of a tensor; integers become int64 when they do."""

    value: Tensor


@dataclass(frozen=True)
class Max:
    """A statistic of which the largest over the parts counts, entry by entry."""

    value: Tensor


@dataclass(frozen=True)
class Min:
    """A statistic of which the smallest over the parts counts, entry by entry."""

    value: Tensor


Reading = Sum | Max | Min


@dataclass(frozen=True)
class Outputs:
    """A merged region with its by-products: tensors named in EXTRAS, or readings for the merge's metrics."""

    tensor: Tensor
    extras: Mapping[str, Tensor | Reading] = field(default_factory=dict)


class Running:
    """Combines the readings of a tensor's chunks, in whatever order they come, to the same bits.

    Integers, maxima and minima are combined at once; float sums wait and are added by the tree, in order of index.
    Not safe for threads: lock around `add`.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, type[Sum] | type[Max] | type[Min]] = {}
        self._done: dict[str, Tensor] = {}
        # in one piece of memory: thousands of little tensors between large ones would keep the heap from being reused
        self._parts: dict[str, tuple[list[int], Tensor]] = {}
        self._own: set[str] = set()

    def add(self, index: int, readings: Mapping[str, Reading]) -> None:
        for name, reading in readings.items():
            value = reading.value
            assert self._kinds.setdefault(name, type(reading)) is type(reading), f"{name} is of two kinds"
            if isinstance(reading, Sum) and value.is_floating_point():
                indices, store = self._parts.get(name) or ([], value.new_empty(4, *value.shape))
                if len(indices) == len(store):
                    store = torch.cat([store, torch.empty_like(store)])
                store[len(indices)] = value
                indices.append(index)
                self._parts[name] = indices, store
            elif name not in self._done:
                self._done[name] = value.long() if isinstance(reading, Sum) else value
            elif isinstance(reading, Sum):
                if name not in self._own:  # what was handed in is not ours to add to
                    self._done[name] = self._done[name].clone()
                    self._own.add(name)
                self._done[name] += value
            else:
                bigger = torch.maximum if isinstance(reading, Max) else torch.minimum
                self._done[name] = bigger(self._done[name], value)

    def readings(self) -> dict[str, Reading]:
        """All that was added, as one reading each."""
        out: dict[str, Reading] = {}
        for name, kind in self._kinds.items():
            if name in self._parts:
                indices, store = self._parts[name]
                out[name] = kind(tree(store[sorted(range(len(indices)), key=indices.__getitem__)]))
            else:
                out[name] = kind(self._done[name])
        return out

    def values(self) -> dict[str, Tensor]:
        """All that was added, as tensors: what a method sees in `stats`."""
        return values(self.readings())


def joined(parts: Sequence[Mapping[str, Reading]]) -> dict[str, Reading]:
    """Readings of parts as readings of the whole; float sums by the tree, in the order given."""
    running = Running()
    for index, part in enumerate(parts):
        running.add(index, part)
    return running.readings()


def values(readings: Mapping[str, Reading]) -> dict[str, Tensor]:
    return {name: reading.value for name, reading in readings.items()}


def deltas(tensors: Tensor, base: Tensor) -> Tensor:  # (K, n), (n,)
    """(K, n) task vectors, fresh memory."""
    return tensors - base


def upper(tensors: Tensor, base: Tensor) -> dict[str, Reading]:
    """The first of the two passes that find a magnitude of task vectors by its rank."""
    return {"high": Sum(high_counts(tensors, base))}


def lower(tensors: Tensor, base: Tensor, *, stats: Mapping[str, Tensor]) -> dict[str, Reading]:
    """The second, in the buckets that the first one left."""
    return {"low": Sum(low_counts(tensors, stats["bucket"], base))}


def rescaling(how: str, densities: Tensor, stats: Mapping[str, Tensor]) -> Tensor:  # (K,)
    """(K,) float32 what is left of a thinned task vector is multiplied by: 1 / density, the share of |d| lost, or 1.

    `stats["sums"]` (K, 2) has the sums of |d| over all entries and over those that stayed; 1 where nothing did.
    """
    if how == "none":
        return torch.ones(len(densities))
    whole, left = stats["sums"].cpu().T if how == "l1" else (torch.ones(len(densities)), densities)
    return torch.where(left > 0, whole / torch.where(left > 0, left, 1.0), 1.0).float()


def scaled(base: Tensor, vector: Tensor, scale: float) -> Tensor:  # (n,), (n,) which it may overwrite
    """(n,) base + scale * vector, in the vector's memory."""
    if scale != 1.0:
        vector = vector.mul_(scale)
    return vector.add_(base)


def per_model(
    value: float | Sequence[float], k: int, what: str, low: float | None = None, high: float | None = None
) -> Tensor:
    """(K,) float32 of one number for all or of one each; ValueError for the wrong count or one outside [low, high]."""
    return torch.tensor(numbers(value, k, what, low, high), dtype=torch.float32)


def numbers(
    value: float | Sequence[float], k: int, what: str, low: float | None = None, high: float | None = None
) -> list[float]:
    """The K Python floats of one number for all or of one each; ValueError as `per_model`."""
    given = [float(one) for one in value] if isinstance(value, Sequence) else [float(value)] * k
    if len(given) != k:
        raise ValueError(f"{what} has {len(given)} values for {k} models; give one number, or one for each model")
    for one in given:
        if not math.isfinite(one) or (low is not None and one < low) or (high is not None and one > high):
            between = f"from {'-inf' if low is None else f'{low:g}'} to {'inf' if high is None else f'{high:g}'}"
            raise ValueError(f"{what} is {one:g}; allowed are numbers {between}")
    return given


def everything(density: float | Sequence[float]) -> bool:
    """Whether all models keep all entries."""
    return all(one == 1 for one in (density if isinstance(density, Sequence) else [density]))


def choice(word: str, parameter: str, given: str, allowed: Sequence[str]) -> None:
    """Raises ValueError, with the nearest spelling, unless `given` is allowed."""
    if given not in allowed:
        near = difflib.get_close_matches(str(given), allowed, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{word}: {parameter} is '{given}', allowed are {', '.join(allowed)}{hint}")


def is_embedding(name: str) -> bool:
    """Whether a part of the dotted name begins as those of embeddings do; GPT-NeoX calls its head embed_out."""
    return any(part.startswith(EMBEDDINGS) and part != "embed_out" for part in name.split("."))
