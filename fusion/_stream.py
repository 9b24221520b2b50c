"""Merges tensors from disk to disk, region by region: compare, statistics passes, map, checksum.

A region is the same range of elements of all models. Its size changes no bit of the result: statistics add up by a
fixed tree, random numbers go by element, and whether models agree is asked of whole tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusion._manifest import Manifest
from fusion._method import Method, Region
from fusion._misfit import called
from fusion._observe import observed
from fusion._pool import Job, Pool, Room, Slot, Unit
from fusion._tasks import Inputs, Task
from fusion.checkpoint import Source, Writer
from fusion.merge._x import BLOCK, Outputs, Running

COPY = 1 << 20  # elements at a time where nothing is computed


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
        return self.task.name if self.whole else f"{self.task.name} [{self.start}:{self.stop}]"


class Stream:
    """Everything that works on one merge share: what is read, what is done, where it is written."""

    def __init__(
        self,
        inputs: Inputs,
        recipe: Recipe | None,
        sidecars: Mapping[str, Source],  # model -> its statistics; "" is the base's
        writer: Writer,
        extras: Writer | None,
        manifest: Manifest,
        *,
        chunk: int,
        slots: int,
        threads: int,
        memory: int,
        device: str,
        told: Callable[[Task], None],
    ) -> None:
        self.inputs, self.recipe, self.sidecars = inputs, recipe, sidecars
        self.writer, self.extras, self.manifest = writer, extras, manifest
        self.chunk, self.device, self.told = chunk, device, told
        self.computing = threading.Semaphore(threads)
        self.lock = threading.Lock()
        self.bytes_read = 0
        self.room = Room(memory)
        self.pool = Pool(slots, slots + 2)

    def run(self, works: Sequence[Work]) -> None:
        """Returns when all of it is written and noted down."""
        self.pool.run(self._job(work) for work in works)

    def collect(self, works: Sequence[Work], index: int, take: Callable[[Work, Running], None]) -> None:
        """Statistics pass `index` (with index -1: none, the comparison only) over these; `take` gets what it found."""

        def job(work: Work) -> Job:
            if work.equal is None:
                yield [lambda slot: self._compare(work, slot)]
            running = Running()
            if index >= 0:
                yield self._passed(work, index, running)
            take(work, running)

        self.pool.run(job(work) for work in works)

    # --- one tensor ---

    def _job(self, work: Work) -> Job:
        task = work.task
        if self.manifest.has(work.key):
            kept: list[bool] = []
            yield [lambda slot: kept.append(self._verified(work))]
            if kept[0]:
                self.told(task)
                return
        size = task.numel
        if size and task.action == "merge":
            yield from self._merged(work)
        elif size:
            source = self.inputs.source(task.origin) if task.action == "copy" else self.first
            if task.action == "same":
                yield [lambda slot: self._compare(work, slot)]
                if not work.equal:
                    self._refuse_numbers(task)
            yield self._copied(work, source)
        yield [lambda slot: self._sealed(work)]

    @property
    def first(self) -> Source:
        return next(iter(self.inputs.models.values()))

    def _merged(self, work: Work) -> Job:
        recipe = self._recipe()
        if work.equal is None:
            yield [lambda slot: self._compare(work, slot)]
        method, stays = recipe.method, recipe.method.equal_stays(recipe.weights, work.params)
        work.equal = same = bool(work.equal) and stays and not method.extras
        if same and not recipe.post:
            yield self._copied(work, self.first)
            return
        if not same and work.whole and not work.stats:
            for index in range(method.needed(work.params)):
                running = Running()
                yield self._passed(work, index, running)
                work.stats = method.settle({**work.stats, **running.values()}, work.params, recipe.weights)
        yield [self._mapped(work, n, start, stop, same) for n, (start, stop) in enumerate(self._ranges(work, True))]

    def _ranges(self, work: Work, mapping: bool) -> list[tuple[int, int]]:
        """The regions of a work; whole rows where a word wants them."""
        recipe, size = self._recipe(), self.chunk
        if recipe.method.unit == "tensor":
            return [(work.start, work.stop)]
        if recipe.method.unit == "row" or (mapping and recipe.by_rows):
            length = row_length(work.task.shape)
            size = length * (1 << max(0, (self.chunk // length).bit_length() - 1))
        return [(at, min(at + size, work.stop)) for at in range(work.start, work.stop, size)]

    def _passed(self, work: Work, index: int, running: Running) -> list[Unit]:
        method = self._recipe().method

        def unit(number: int, start: int, stop: int) -> Unit:
            def read(slot: Slot) -> None:
                with self._space(work, slot):
                    region = self._region(work, start, stop, slot, check=index == 0)
                    with self.computing:
                        found = method.call_pass(index, region, work.params)
                with work.lock:
                    running.add(number, found)

            return read

        return [unit(n, start, stop) for n, (start, stop) in enumerate(self._ranges(work, False))]

    def _mapped(self, work: Work, number: int, start: int, stop: int, same: bool) -> Unit:
        recipe, task = self._recipe(), work.task

        def write(slot: Slot) -> None:
            with self._space(work, slot):
                made(slot)

        def made(slot: Slot) -> None:
            region = self._region(work, start, stop, slot, check=same or not recipe.method.needed(work.params))
            with self.computing:
                if same:
                    found = Outputs(region.tensors[0].clone())  # type: ignore[index]
                else:
                    found = recipe.method.call(region, work.params)
                out = found.tensor
                for word, params in recipe.post:
                    given = word.resolve(params, task.name, work.layer)
                    out = word.call(replace(region, merged=out.reshape(-1), inputs=self._post_sides(task, word)), given).tensor
                out = out.reshape(-1).float().cpu()
                self._refuse_infinite(out, task)
                packed = slot.packed(len(out), task.dtype).copy_(out)
                seen: dict[str, Any] = {}
                if isinstance(region.tensors, Tensor) and region.tensors.dim() == 2 and self.device == "cpu":
                    seen = dict(observed(region.tensors, region.base, out, start))
            self.writer.write(task.name, start, packed)
            for name, value in found.extras.items():
                if isinstance(value, Tensor):
                    self._write_extra(f"{name}/{task.name}", task.numel, start, value)
                else:
                    seen[name] = value
            with work.lock:
                work.readings.add(number, seen)

        return write

    @contextmanager
    def _space(self, work: Work, slot: Slot) -> Iterator[None]:
        """A whole tensor waits until there is memory for it, and keeps none of it; regions have theirs already."""
        if self._recipe().method.unit != "tensor":
            yield
            return
        with self.room.of(whole_bytes(len(self.inputs.models), work.task.numel)):
            yield
            slot.clear()

    def _write_extra(self, name: str, numel: int, start: int, value: Tensor) -> None:  # (K, n)
        assert self.extras is not None
        for row, one in enumerate(value.flatten(1).cpu()):
            self.extras.write(name, row * numel + start, one.contiguous())

    def _copied(self, work: Work, source: Source) -> list[Unit]:
        task = work.task
        own = task.sources[0]
        entry = source.entries[own]

        def unit(start: int, stop: int) -> Unit:
            def copy(slot: Slot) -> None:
                count = stop - start
                raw = slot.raw(1, count, entry.dtype.itemsize)[0].view(entry.dtype)
                self._read(source, own, start, stop, raw)
                if entry.dtype.is_floating_point:
                    with self.computing:
                        wide = slot.wide(1, count)[0].copy_(raw)
                        self._refuse_nan(wide[None], [(task.origin or self.inputs.target[0], own)])
                        if entry.dtype != task.dtype:
                            raw = slot.packed(count, task.dtype).copy_(raw)
                            self._refuse_infinite(raw.float(), task)
                self.writer.write(task.name, start, raw)

            return copy

        return [unit(at, min(at + COPY, work.stop)) for at in range(work.start, work.stop, COPY)]

    def _sealed(self, work: Work) -> None:
        size = work.task.dtype.itemsize
        checksum = self.writer.checksum(work.task.name, work.start * size, work.stop * size)
        action = "equal" if work.task.action == "merge" and work.equal else work.task.action
        self.manifest.add(work.key, checksum, action, work.readings.values())
        work.stats, work.readings = {}, Running()  # works outlive their tensors' turn
        self.told(work.task)

    def _verified(self, work: Work) -> bool:
        size = work.task.dtype.itemsize
        checksum = self.writer.checksum(work.task.name, work.start * size, work.stop * size)
        return checksum == self.manifest.checksum(work.key)

    # --- regions ---

    def _who(self, task: Task) -> Iterator[tuple[str, Source, str]]:
        """(model, source, its name of the tensor) of all that a method looks at; the base is ""."""
        for (model, source), own in zip(self.inputs.models.items(), task.sources, strict=True):
            yield model, source, own
        uses = self.recipe is not None and self.recipe.uses_base or task.action == "same"
        if self.inputs.base is not None and task.base is not None and uses:
            yield "", self.inputs.base, task.base

    def _read(self, source: Source, name: str, start: int, stop: int, into: Tensor) -> None:
        source.read(name, start, stop, into)
        with self.lock:
            self.bytes_read += into.numel() * into.element_size()

    def _compare(self, work: Work, slot: Slot) -> None:
        """Whether all models agree on a range; where they differ at once little is read."""
        who = list(self._who(work.task))
        entries = [source.entries[own] for _, source, own in who]
        at, step, equal = work.start, BLOCK, len({entry.dtype for entry in entries}) == 1
        while at < work.stop and equal:
            count = min(step, work.stop - at)
            first, other = slot.raw(2, count, entries[0].dtype.itemsize)
            first, other = first.view(entries[0].dtype), other.view(entries[0].dtype)
            self._read(who[0][1], who[0][2], at, at + count, first)
            for _, source, own in who[1:]:
                self._read(source, own, at, at + count, other)
                if not torch.equal(first, other):
                    equal = False
                    break
            at, step = at + count, self.chunk
        work.equal = equal

    def _region(self, work: Work, start: int, stop: int, slot: Slot, check: bool) -> Region:
        """The models' elements [start, stop) in float32, and what else a method may ask for."""
        recipe, task, count = self._recipe(), work.task, stop - start
        who = list(self._who(task))
        k, sequential = len(task.sources), recipe.method.sequential
        shape = task.shape if recipe.method.unit == "tensor" else (count,)
        rows = 1 + (len(who) - k) if sequential else len(who)
        wide = slot.wide(rows, count)
        for row, (_, source, own) in enumerate(who[k:] if sequential else who):
            self._widened(source, own, start, stop, slot, wide[row + sequential])
        if check and not sequential:
            with self.computing:
                self._refuse_nan(wide, [(model, own) for model, _, own in who])
        tensors: Any
        if sequential:
            tensors, below = self._one_by_one(work, who[:k], slot, wide[0]), wide[1:]
        else:
            tensors, below = wide[:k].view(k, *shape).to(self.device), wide[k:]
        base = below[0].view(shape).to(self.device) if len(who) > k else None
        given = self._sides(work, start, stop)
        weights = recipe.weights.to(self.device)
        return Region(
            tensors, base, weights, task.name, task.shape, work.layer, start, work.stats, given, seed=recipe.seed
        )

    def _one_by_one(
        self, work: Work, who: Sequence[tuple[str, Source, str]], slot: Slot, wide: Tensor
    ) -> Iterator[Tensor]:
        for model, source, own in who:
            self._widened(source, own, work.start, work.stop, slot, wide, held=True)
            self._refuse_nan(wide[None], [(model, own)])
            yield wide.view(work.task.shape).to(self.device)

    def _widened(
        self, source: Source, own: str, start: int, stop: int, slot: Slot, into: Tensor, held: bool = False
    ) -> None:
        """Reads and converts; `held`: the caller is counted among those computing already."""
        dtype = source.entries[own].dtype
        if dtype == torch.float32:
            self._read(source, own, start, stop, into)
            return
        raw = slot.raw(1, stop - start, dtype.itemsize)[0].view(dtype)
        self._read(source, own, start, stop, raw)
        with nullcontext() if held else self.computing:
            into.copy_(raw)

    def _sides(self, work: Work, start: int, stop: int) -> dict[str, Any]:
        """What the method reads of the models' statistics for this region."""
        recipe, task = self._recipe(), work.task
        found: dict[str, Any] = {}
        for name, kind in recipe.method.inputs.items():
            own = [(model, f"{name}/{own}") for model, own in zip(self.inputs.models, task.sources, strict=True)]
            has = [pair for pair in own if pair[0] in self.sidecars and pair[1] in self.sidecars[pair[0]].entries]
            if kind == "tensor":
                found[name] = [self._whole(*pair) if pair in has else None for pair in own] if has else None
                continue
            if has and len(has) < len(own):
                lacking = next(model for model, wanted in own if (model, wanted) not in has)
                raise ValueError(f"{recipe.method.word} needs {name}/... of {task.name} of every model; '{lacking}' has none")
            rows = [self._side(model, wanted, task, start, stop) for model, wanted in has]
            shape = task.shape if recipe.method.unit == "tensor" else (stop - start,)
            found[name] = torch.stack(rows).view(-1, *shape).to(self.device) if rows else None
        return found

    def _post_sides(self, task: Task, word: Method) -> dict[str, Tensor | None]:
        """What a post word reads of the base's statistics."""
        sidecar = self.sidecars.get("")
        has = set() if sidecar is None else sidecar.entries.keys()
        return {
            name: self._whole("", f"{name}/{task.base}").to(self.device) if f"{name}/{task.base}" in has else None
            for name in word.inputs
        }

    def _whole(self, model: str, name: str) -> Tensor:
        source = self.sidecars[model]
        entry = source.entries[name]
        raw = torch.empty(entry.numel, dtype=entry.dtype)
        self._read(source, name, 0, entry.numel, raw)
        return raw.float().view(entry.shape)

    def _side(self, model: str, name: str, task: Task, start: int, stop: int) -> Tensor:
        source = self.sidecars[model]
        entry = source.entries[name]
        if entry.shape != task.shape:
            raise ValueError(f"{source.path}: {name} is {entry.shape}, the tensor it is about {task.shape}")
        raw = torch.empty(stop - start, dtype=entry.dtype)
        self._read(source, name, start, stop, raw)
        return raw.float()

    # --- refusals ---

    def _refuse_nan(self, wide: Tensor, who: Sequence[tuple[str, str]]) -> None:  # (rows, n)
        """ValueError naming tensor and model; a sum tells at a fraction of the price of looking at every number."""
        if bool(torch.isfinite(wide.sum())):
            return
        for row, (model, own) in zip(wide, who, strict=True):
            if not bool(torch.isfinite(row).all()):
                kind = "NaN" if bool(row.isnan().any()) else "infinity"
                raise ValueError(f"{own} of {called(model)} has {kind} in it; a merge would spread it")

    def _refuse_infinite(self, out: Tensor, task: Task) -> None:
        most = torch.finfo(task.dtype).max
        low, high = torch.aminmax(out)
        if not (float(low) >= -most and float(high) <= most):
            kind = "NaN" if bool(out.isnan().any()) else f"numbers that {str(task.dtype)[6:]} can't hold (above {most:.3g})"
            raise ValueError(f"the merged {task.name} has {kind} in it; look at the method's parameters and weights")

    def _refuse_numbers(self, task: Task) -> None:
        dtype = str(task.dtype)[6:]
        raise ValueError(
            f"{task.name} holds whole numbers ({dtype}) that differ between the models, and an average of them means "
            f"nothing; say with copy: that it stays {called(self.inputs.target[0])}'s"
        )

    def _recipe(self) -> Recipe:
        assert self.recipe is not None, "only copies have none"
        return self.recipe


def whole_bytes(models: int, numel: int) -> int:
    """Memory of a whole-tensor method on one tensor, beside what it needs for itself: raw and float32 inputs, results."""
    return 4 * numel * (2 * models + 4)


def row_length(shape: Sequence[int]) -> int:
    """Numbers behind one index of the first axis; a vector is one row."""
    numel = torch.Size(shape).numel()
    return numel // shape[0] if len(shape) > 1 else max(numel, 1)
