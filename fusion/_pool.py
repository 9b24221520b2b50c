"""A few threads, each with buffers of its own, that work on several tensors at a time.

A job is a generator: it yields units that may run side by side, and goes on when all of them are done. Every thread
reads, computes and writes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Slot:
    """Buffers of one thread, reused from unit to unit; they grow to the largest unit."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned  # for an accelerator, which copies from such memory while it computes
        self.clear()

    def clear(self) -> None:
        """Gives the memory back: what whole tensors take is not to be kept by every thread."""
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._wide = torch.empty(0)
        self._packed = torch.empty(0, dtype=torch.uint8)

    def raw(self, rows: int, count: int, size: int) -> list[Tensor]:
        """Rows of bytes for `count` elements of at most `size` bytes, each aligned."""
        stride = -(-count * size // 64) * 64
        if len(self._raw) < rows * stride:
            self._raw = torch.empty(rows * stride, dtype=torch.uint8)
        return [self._raw[row * stride : row * stride + count * size] for row in range(rows)]

    def wide(self, rows: int, count: int) -> Tensor:
        """(rows, count) float32."""
        if len(self._wide) < rows * count:
            self._wide = torch.empty(rows * count, pin_memory=self.pinned)
        return self._wide[: rows * count].view(rows, count)

    def packed(self, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) of what is to be written."""
        if len(self._packed) < count * dtype.itemsize:
            self._packed = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return self._packed[: count * dtype.itemsize].view(dtype)


class Room:
    """Memory that units share: who asks waits for it to be free; what is larger than all of it gets it alone."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.used == 0 or self.used + size <= self.size)
            self.used += size
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()


Unit = Callable[[Slot], None]
Job = Iterator[Sequence[Unit]]


@dataclass
class _Active:
    job: Job
    ready: deque[Unit] = field(default_factory=deque)
    left: int = 0  # units that are not done yet


class Pool:
    """Runs jobs in their order, at most `width` of them at a time, on `slots` threads."""

    def __init__(self, slots: int, width: int, pinned: bool = False) -> None:
        self.slots = [Slot(pinned) for _ in range(slots)]
        self.width = width
        self.changed = threading.Condition()
        self.active: list[_Active] = []
        self.waiting: Iterator[Job] = iter(())
        self.stopped = False

    def run(self, jobs: Iterable[Job]) -> None:
        """Returns when all jobs are done; raises what the first failing unit raised."""
        self.waiting, self.active = iter(jobs), []
        # the number of threads of a matrix product is each thread's own, and the bits depend on it
        with ThreadPoolExecutor(len(self.slots), "merge", torch.set_num_threads, (1,)) as executor:
            try:
                for future in [executor.submit(self._work, slot) for slot in self.slots]:
                    future.result()
            finally:  # also after Ctrl-C: the threads end with the unit they are at
                self._stop()
        self.stopped = False

    def _work(self, slot: Slot) -> None:
        whole = False
        try:
            while (found := self._take()) is not None:
                one, unit = found
                if unit is not None:
                    unit(slot)
                if self._finished(one, unit):
                    self._advance(one)
            whole = True
        finally:
            if not whole:
                self._stop()

    def _stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _take(self) -> tuple[_Active, Unit | None] | None:
        """The next unit of the oldest job that has one, or a job to be begun."""
        with self.changed:
            while not self.stopped:
                for one in self.active:
                    if one.ready:
                        return one, one.ready.popleft()
                if len(self.active) < self.width:
                    job = next(self.waiting, None)
                    if job is not None:
                        self.active.append(_Active(job))
                        return self.active[-1], None
                if not self.active:
                    self.changed.notify_all()
                    return None
                self.changed.wait()
            return None

    def _finished(self, one: _Active, unit: Unit | None) -> bool:
        with self.changed:
            one.left -= unit is not None
            return one.left == 0

    def _advance(self, one: _Active) -> None:
        """Asks a job, none of whose units is left, for the next ones."""
        units = next((units for units in one.job if units), None)
        with self.changed:
            if units is None:
                self.active.remove(one)
            else:
                one.left = len(units)
                one.ready.extend(units)
            self.changed.notify_all()
