"""Merges tensors from disk to disk, region by region: compare, statistics passes, map, checksum.

The size of a region changes no bit of the result: statistics add up by a fixed tree, random numbers go by element, and
whether models agree is asked of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusion._deal import large_bytes
from fusion._manifest import Manifest
from fusion._method import Region
from fusion._misfit import called
from fusion._observe import observed
from fusion._pool import Job, Pool, Room, Slot, Unit
from fusion._regions import Reader, Recipe, Work, refuse_infinite, refuse_nan
from fusion._tasks import Task
from fusion.checkpoint import Source, Writer
from fusion.merge._sums import whole_rows
from fusion.merge._x import Outputs, Running

COPY = 1 << 17  # elements at a time where nothing is computed


class Stream:
    """Everything that works on one merge share: what is read, what is done, where it is written."""

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        extras: Writer | None,
        manifest: Manifest,
        *,
        chunk: int,  # elements of a region
        slots: int,
        memory: int,  # bytes that whole tensors may take together
        told: Callable[[Task], None],  # is called when a tensor is done
    ) -> None:
        self.reader, self.writer, self.extras, self.manifest = reader, writer, extras, manifest
        self.chunk, self.told = chunk, told
        self.room = Room(memory)
        self.pool = Pool(slots, slots + 2, pinned=reader.device != "cpu")

    @property
    def recipe(self) -> Recipe:
        assert self.reader.recipe is not None, "only copies have none"
        return self.reader.recipe

    def run(self, works: Sequence[Work]) -> None:
        """Returns when all of it is written and noted down."""
        self.pool.run(self._job(work) for work in works)

    def collect(self, works: Sequence[Work], index: int, take: Callable[[Work, Running], None]) -> None:
        """Statistics pass `index` (with index -1: none, the comparison only) over these; `take` gets what it found."""

        def job(work: Work) -> Job:
            if work.equal is None:
                yield [lambda slot: self.reader.compare(work, slot)]
            running = Running()
            if index >= 0:
                yield self._passed(work, index, running)
            take(work, running)

        self.pool.run(job(work) for work in works)

    def _job(self, work: Work) -> Job:
        """All that happens to one tensor."""
        task = work.task
        if self.manifest.has(work.key):
            kept: list[bool] = []
            yield [lambda slot: kept.append(self._checksum(work) == self.manifest.checksum(work.key))]
            if kept[0]:
                self.told(task)
                return
        if task.numel and task.action == "merge":
            yield from self._merged(work)
        elif task.numel:
            inputs = self.reader.inputs
            if task.action == "same":
                yield [lambda slot: self.reader.compare(work, slot)]
                if not work.equal:
                    raise ValueError(
                        f"{task.name} holds whole numbers ({str(task.dtype)[6:]}) that differ between the models, and "
                        f"an average of them means nothing; say with copy: that it stays {called(inputs.target[0])}'s"
                    )
            yield self._copied(work, inputs.source(task.origin) if task.action == "copy" else self._first)
        yield [lambda slot: self._sealed(work)]

    @property
    def _first(self) -> Source:
        return next(iter(self.reader.inputs.models.values()))

    def _merged(self, work: Work) -> Job:
        method = self.recipe.method
        regions = self._ranges(work, mapping=True)
        fresh = work.whole and work.equal is None and not work.stats
        if fresh and len(regions) == 1 and not method.sequential and self.reader.plain(work.task):
            yield [lambda slot: self._at_once(work, slot)]
            return
        if work.equal is None:
            yield [lambda slot: self.reader.compare(work, slot)]
        self._judge(work)
        if work.equal and not self.recipe.post:
            yield self._copied(work, self._first)
            return
        if not work.equal and work.whole and not work.stats:
            for index in range(method.needed(work.params)):
                running = Running()
                yield self._passed(work, index, running)
                work.stats = method.settle({**work.stats, **running.values()}, work.params, self.recipe.weights)
        yield [self._mapped(work, number, *one) for number, one in enumerate(regions)]

    def _judge(self, work: Work) -> None:
        """From here on `equal` says whether the tensor is copied because all models agree."""
        method = self.recipe.method
        stays = bool(work.equal) and method.equal_stays(self.recipe.weights, work.params)
        work.equal = stays and not method.extras

    def _ranges(self, work: Work, mapping: bool) -> list[tuple[int, int]]:
        """The regions of a work; whole rows where a word wants them."""
        recipe, size = self.recipe, self.chunk
        if recipe.method.unit == "tensor":
            return [(work.start, work.stop)]
        if recipe.method.unit == "row" or (mapping and recipe.by_rows):
            size = whole_rows(work.task.shape, self.chunk)
        return [(at, min(at + size, work.stop)) for at in range(work.start, work.stop, size)]

    def _at_once(self, work: Work, slot: Slot) -> None:
        """A tensor of one region is read once for everything."""
        method = self.recipe.method
        with self._space(work, slot, work.stop - work.start):
            region = self.reader.region(work, work.start, work.stop, slot, check=True)
            first, *others = [*region.stacked.unbind(), *([] if region.base is None else [region.base])]
            work.equal = all(torch.equal(first, other) for other in others)
            self._judge(work)
            for index in range(0 if work.equal else method.needed(work.params)):
                running = Running()
                running.add(0, method.call_pass(index, region, work.params))
                work.stats = method.settle({**work.stats, **running.values()}, work.params, self.recipe.weights)
                region = replace(region, stats=work.stats)
            self._written(work, 0, region, slot)

    def _passed(self, work: Work, index: int, running: Running) -> list[Unit]:
        method = self.recipe.method
        if index >= method.needed(work.params):  # of a joint round that other tensors need
            return []

        def unit(number: int, start: int, stop: int) -> Unit:
            def read(slot: Slot) -> None:
                with self._space(work, slot, stop - start):
                    region = self.reader.region(work, start, stop, slot, check=index == 0)
                    found = method.call_pass(index, region, work.params)
                with work.lock:
                    running.add(number, found)

            return read

        return [unit(number, *one) for number, one in enumerate(self._ranges(work, mapping=False))]

    def _mapped(self, work: Work, number: int, start: int, stop: int) -> Unit:
        check = bool(work.equal) or not self.recipe.method.needed(work.params)  # else the first pass has looked

        def write(slot: Slot) -> None:
            with self._space(work, slot, stop - start):
                self._written(work, number, self.reader.region(work, start, stop, slot, check), slot)

        return write

    def _written(self, work: Work, number: int, region: Region, slot: Slot) -> None:
        """The method on one region, the words that follow, and the result in its place."""
        recipe, task = self.recipe, work.task
        found = Outputs(next(iter(region.tensors))) if work.equal else recipe.method.call(region, work.params)
        out = found.tensor.reshape(-1)
        base = None if region.base is None else region.base.reshape(-1)
        for word, given in recipe.post:
            follows = replace(region, merged=out, base=base, inputs=self.reader.post_sides(task, word))
            out = word.call(follows, word.resolve(given, task.name, work.layer)).tensor.reshape(-1)
        seen: dict[str, Any] = {}
        if isinstance(region.tensors, Tensor) and not work.equal:
            seen = dict(observed(region.tensors.reshape(len(region.tensors), -1), base, out, region.start))
        out = out.float().cpu()
        refuse_infinite(out, task)
        packed = slot.packed(len(out), task.dtype).copy_(out)
        self.writer.write(task.name, region.start, packed)
        for name, value in found.extras.items():
            if isinstance(value, Tensor):
                self._write_extra(f"{name}/{task.name}", task.numel, region.start, value)
            else:
                seen[name] = value
        with work.lock:
            work.readings.add(number, seen)

    @contextmanager
    def _space(self, work: Work, slot: Slot, count: int) -> Iterator[None]:
        """A whole tensor or a long row waits until there is memory for it, and keeps none of it; regions have theirs
        already."""
        if self.recipe.method.unit != "tensor" and count <= self.chunk:
            yield
            return
        with self.room.of(large_bytes(self.recipe, work.task, count)):
            yield
            slot.clear()

    def _write_extra(self, name: str, numel: int, start: int, value: Tensor) -> None:  # (K, n)
        assert self.extras is not None
        for row, one in enumerate(value.flatten(1).cpu()):
            self.extras.write(name, row * numel + start, one.contiguous())

    def _copied(self, work: Work, source: Source) -> list[Unit]:
        task, own = work.task, work.task.sources[0]
        entry = source.entries[own]

        def unit(start: int, stop: int) -> Unit:
            def copy(slot: Slot) -> None:
                count = stop - start
                raw = slot.raw(1, count, entry.dtype.itemsize)[0].view(entry.dtype)
                self.reader.read(source, own, start, stop, raw)
                if entry.dtype.is_floating_point:
                    wide = slot.wide(1, count).copy_(raw)
                    refuse_nan(wide, [(task.origin or self.reader.inputs.target[0], own)])
                    if entry.dtype != task.dtype:
                        refuse_infinite(wide[0], task)
                        raw = slot.packed(count, task.dtype).copy_(raw)
                self.writer.write(task.name, start, raw)

            return copy

        return [unit(at, min(at + COPY, work.stop)) for at in range(work.start, work.stop, COPY)]

    def _checksum(self, work: Work) -> str:
        size = work.task.dtype.itemsize
        return self.writer.checksum(work.task.name, work.start * size, work.stop * size)

    def _sealed(self, work: Work) -> None:
        action = "equal" if work.task.action == "merge" and work.equal else work.task.action
        self.manifest.add(work.key, self._checksum(work), action, work.readings.values())
        work.stats, work.readings = {}, Running()  # works outlive their tensors' turn
        self.told(work.task)
