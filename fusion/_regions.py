"""Regions of models: the same range of elements of each, read, widened to float32 and checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusion._method import Method, Region
from fusion._misfit import called
from fusion._pool import Slot
from fusion._tasks import Inputs, Task
from fusion.checkpoint import Checkpoint, Source
from fusion.merge._x import BLOCK, Running


@dataclass(frozen=True)
class Recipe:
    """What is done to every tensor: the method with its parameters as given, and the words that follow it."""

    method: Method
    params: Mapping[str, Any]
    weights: Tensor
    post: tuple[tuple[Method, Mapping[str, Any]], ...] = ()
    seed: int = 0

    @property
    def uses_base(self) -> bool:
        return "base" in self.method.needs or any("base" in word.needs for word, _ in self.post)

    @property
    def by_rows(self) -> bool:
        return self.method.unit == "row" or any(word.unit == "row" for word, _ in self.post)


@dataclass
class Work:
    """A tensor, or the range [start, stop) of one that ranks share, on its way."""

    task: Task
    layer: tuple[int, int] | None
    params: Mapping[str, Any]
    start: int
    stop: int
    whole: bool = True
    equal: bool | None = None  # whether all models agree; None until asked
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    readings: Running = field(default_factory=Running)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        """What the manifest calls it."""
        return key(self.task, self.start, self.stop)


def key(task: Task, start: int, stop: int) -> str:
    return task.name if stop - start == task.numel else f"{task.name} [{start}:{stop}]"


class Reader:
    """Reads what a method or a comparison wants to see; safe for threads, each with a slot of its own."""

    def __init__(self, inputs: Inputs, recipe: Recipe | None, sidecars: Mapping[str, Source], device: str) -> None:
        self.inputs, self.recipe, self.sidecars, self.device = inputs, recipe, sidecars, device
        self.lock = threading.Lock()
        self.bytes = 0

    def read(self, source: Source, name: str, start: int, stop: int, into: Tensor) -> None:
        source.read(name, start, stop, into)
        self._count(into.nbytes)

    def _count(self, size: int) -> None:
        with self.lock:
            self.bytes += size

    def plain(self, task: Task) -> bool:
        """Whether float32 regions tell if models agree: they have one dtype, and float32 holds all of it."""
        dtypes = {source.entries[own].dtype for _, source, own in self._who(task)}
        return len(dtypes) == 1 and dtypes != {torch.float64}

    def compare(self, work: Work, slot: Slot) -> None:
        """Finds out whether all models agree on a range; where they differ at once little is read."""
        who = list(self._who(work.task))
        entries = [source.entries[own] for _, source, own in who]
        at, step, equal = work.start, BLOCK, len({entry.dtype for entry in entries}) == 1
        while at < work.stop and equal:
            count = min(step, work.stop - at)
            first, other = (raw.view(entries[0].dtype) for raw in slot.raw(2, count, entries[0].dtype.itemsize))
            self.read(who[0][1], who[0][2], at, at + count, first)
            for _, source, own in who[1:]:
                self.read(source, own, at, at + count, other)
                if not torch.equal(first, other):
                    equal = False
                    break
            at, step = at + count, 32 * BLOCK
        work.equal = equal

    def region(self, work: Work, start: int, stop: int, slot: Slot, check: bool) -> Region:
        """The models' elements [start, stop) in float32, and what else a method may ask for.

        check: raise ValueError naming tensor and model for a number that is not finite.
        """
        assert self.recipe is not None
        recipe, task, count = self.recipe, work.task, stop - start
        who = list(self._who(task))
        k, sequential = len(task.sources), recipe.method.sequential
        shape = task.shape if recipe.method.unit == "tensor" else (count,)
        wide = slot.wide(1 + len(who) - k if sequential else len(who), count)
        finite = True
        for row, (_, source, own) in enumerate(who[k:] if sequential else who):
            finite &= self._widened(source, own, start, stop, slot, wide[row + sequential])
        if check and not finite and not sequential:
            refuse_nan(wide, [(model, own) for model, _, own in who])
        tensors: Any
        if sequential:
            tensors, below = self._one_by_one(work, who[:k], slot, wide[0]), wide[1:]
        else:
            tensors, below = self._moved(wide[:k].view(k, *shape)), wide[k:]
        return Region(
            tensors,
            self._moved(below[0].view(shape)) if len(who) > k else None,
            recipe.weights.to(self.device),
            task.name,
            task.shape,
            work.layer,
            start,
            work.stats,
            self._sides(work, start, stop),
            seed=recipe.seed,
        )

    def post_sides(self, task: Task, word: Method) -> dict[str, Tensor | None]:
        """What a post word reads of the base's statistics."""
        sidecar = self.sidecars.get("")
        has = set() if sidecar is None else sidecar.entries.keys()
        names = {name: f"{name}/{task.base}" for name in word.inputs}
        return {name: self._moved(self._whole("", own)) if own in has else None for name, own in names.items()}

    def _who(self, task: Task) -> Iterator[tuple[str, Source, str]]:
        """(model, source, its name of the tensor) of all that a method looks at; the base is ""."""
        for (model, source), own in zip(self.inputs.models.items(), task.sources, strict=True):
            yield model, source, own
        uses = task.action == "same" or (self.recipe is not None and self.recipe.uses_base)
        if self.inputs.base is not None and task.base is not None and uses:
            yield "", self.inputs.base, task.base

    def _moved(self, x: Tensor) -> Tensor:
        return x if self.device == "cpu" else x.to(self.device)  # buffers are used again

    def _one_by_one(
        self, work: Work, who: Sequence[tuple[str, Source, str]], slot: Slot, wide: Tensor
    ) -> Iterator[Tensor]:
        for model, source, own in who:
            if not self._widened(source, own, work.start, work.stop, slot, wide):
                refuse_nan(wide[None], [(model, own)])
            yield self._moved(wide.view(work.task.shape))

    def _widened(self, source: Source, own: str, start: int, stop: int, slot: Slot, into: Tensor) -> bool:
        """Whether all of it is known to be finite."""
        if isinstance(source, Checkpoint) and source.read_finite(own, start, stop, into):
            self._count(2 * (stop - start))
            return True
        dtype = source.entries[own].dtype
        if dtype == torch.float32:
            self.read(source, own, start, stop, into)
            return False
        raw = slot.raw(1, stop - start, dtype.itemsize)[0].view(dtype)
        self.read(source, own, start, stop, raw)
        into.copy_(raw)
        return False

    def _sides(self, work: Work, start: int, stop: int) -> dict[str, Any]:
        """What the method reads of the models' statistics for this region."""
        assert self.recipe is not None
        task, method = work.task, self.recipe.method
        found: dict[str, Any] = {}
        for name, kind in method.inputs.items():
            own = [(model, f"{name}/{own}") for model, own in zip(self.inputs.models, task.sources, strict=True)]
            has = [pair for pair in own if pair[0] in self.sidecars and pair[1] in self.sidecars[pair[0]].entries]
            if kind == "tensor":
                found[name] = [self._moved(self._whole(*one)) if one in has else None for one in own] if has else None
                continue
            assert len(has) in (0, len(own)), "checked while planning"
            rows = [self._part(model, wanted, start, stop) for model, wanted in has]
            shape = task.shape if method.unit == "tensor" else (stop - start,)
            found[name] = self._moved(torch.stack(rows).view(-1, *shape)) if rows else None
        return found

    def _whole(self, model: str, name: str) -> Tensor:
        source = self.sidecars[model]
        entry = source.entries[name]
        raw = torch.empty(entry.numel, dtype=entry.dtype)
        self.read(source, name, 0, entry.numel, raw)
        return raw.float().view(entry.shape)

    def _part(self, model: str, name: str, start: int, stop: int) -> Tensor:
        source = self.sidecars[model]
        raw = torch.empty(stop - start, dtype=source.entries[name].dtype)
        self.read(source, name, start, stop, raw)
        return raw.float()


def refuse_nan(wide: Tensor, who: Sequence[tuple[str, str]]) -> None:  # (rows, n), (model, tensor) of each row
    """ValueError naming tensor and model; a sum tells at a fraction of the price of looking at every number."""
    if bool(torch.isfinite(wide.sum())):
        return
    for row, (model, own) in zip(wide, who, strict=True):
        if not bool(torch.isfinite(row).all()):
            kind = "NaN" if bool(row.isnan().any()) else "infinity"
            raise ValueError(f"{own} of {called(model)} has {kind} in it; a merge would spread it")


def refuse_infinite(out: Tensor, task: Task) -> None:  # (n,)
    """ValueError for a result that is not finite, or not when it is written."""
    most = torch.finfo(task.dtype).max
    low, high = torch.aminmax(out)
    if not (float(low) >= -most and float(high) <= most):
        kind = "NaN" if bool(out.isnan().any()) else f"numbers that {str(task.dtype)[6:]} can't hold (above {most:.3g})"
        raise ValueError(f"the merged {task.name} has {kind} in it; look at the method's parameters and weights")
