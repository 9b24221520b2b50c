"""How a merge is cut to a budget of memory and shared among ranks: the same whoever asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from fusion._method import Method
from fusion._misfit import shown
from fusion._regions import Recipe
from fusion._say import size
from fusion._tasks import Task
from fusion.checkpoint import natural
from fusion.merge._sums import BLOCK, row_length

CHUNK = 256 * BLOCK  # elements: with fewer, what Python does for each region counts (docs/merging.md)
OVERHEAD = 8  # float32 regions that a method makes for itself, besides two a model


@dataclass(frozen=True)
class Share:
    """A range of a tensor, and the rank that writes it."""

    task: Task
    start: int
    stop: int
    rank: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.task.numel


def threads_here(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; at least 1 is needed")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of a launch on this machine
    return threads or max(1, len(os.sched_getaffinity(0)) // local)


def checked_chunk(chunk: int) -> int:
    if chunk < BLOCK or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk} elements; a power of two from {BLOCK} on is needed")
    return chunk


def region_bytes(models: int, chunk: int) -> int:
    """Memory of one region on one thread: raw and float32 inputs, what the method makes of them, what is written."""
    return chunk * (8 * (models + 1) + 4 * (2 * models + OVERHEAD) + 4)


def large_bytes(recipe: Recipe, task: Task, count: int) -> int:
    """Memory of `count` elements that are wanted at once, a whole tensor or a row longer than a region, besides a
    method's own needs: raw and float32 inputs, results."""
    if recipe.method.unit != "tensor":
        return region_bytes(len(task.sources), count)
    models = 1 if recipe.method.sequential else len(task.sources)
    return 4 * count * (2 * models + 4)


def too_large(recipe: Recipe | None, tasks: Sequence[Task], memory: int) -> list[str]:
    """A sentence for a merge by whole tensors or rows, the largest of which alone takes more than `memory`."""
    merging = [task for task in tasks if task.action == "merge" and task.numel]
    if recipe is None or not merging or not (recipe.by_rows or recipe.method.unit == "tensor"):
        return []
    whole = recipe.method.unit == "tensor"
    needs = [large_bytes(recipe, one, one.numel if whole else row_length(one.shape)) for one in merging]
    need, largest = max(zip(needs, merging, strict=True), key=lambda pair: pair[0])
    if need <= memory:
        return []
    return [
        f"{recipe.method.word} goes by whole {'tensors, and one' if whole else 'rows, and one of a tensor'} like "
        f"{largest.name} ({shown(largest.entry)}) takes about {size(need)} at once, more than memory "
        f"({size(memory)}): what does not fit is worked on alone"
    ]


def fitted(models: int, memory: int, threads: int, chunk: int | None) -> tuple[int, int]:
    """(elements of a region, threads that hold one) within `memory` bytes; regions shrink first, then threads.

    A thread reads, computes and writes; the kernel reads ahead for it and writes behind it.
    """
    size, slots = checked_chunk(chunk or CHUNK), threads
    while chunk is None and size > BLOCK and slots * region_bytes(models, size) > memory:
        size //= 2
    slots = max(1, min(slots, memory // region_bytes(models, size)))
    if region_bytes(models, size) > memory:
        need = -(-region_bytes(models, size) // 2**20)
        raise ValueError(f"memory: regions of {size} elements of {models} models take {need} MiB; allow at least that")
    return size, slots


def largest_first(method: Method | None, tasks: Sequence[Task]) -> list[Task]:
    """Whole numbers first, since they may end it; then in the order of the files, whole tensors by size."""
    if method is not None and method.unit == "tensor":
        return sorted(tasks, key=lambda task: (task.action != "same", -task.numel, natural(task.name)))
    return sorted(tasks, key=lambda task: task.action != "same")


def dealt(recipe: Recipe | None, tasks: Sequence[Task], world: int, chunk: int) -> list[Share]:
    """All tensors, each with the rank that writes it; large ones cut into aligned ranges. Balanced by bytes."""
    if world == 1:
        return [Share(task, 0, task.numel, 0) for task in tasks]
    limit = max(1, sum(task.numel for task in tasks) // (4 * world))
    shares = [Share(task, start, stop, 0) for task in tasks for start, stop in _cut(recipe, task, limit, chunk)]
    loads = [0] * world
    ranks: dict[tuple[str, int], int] = {}
    for share in sorted(shares, key=lambda share: (share.start - share.stop, natural(share.task.name), share.start)):
        rank = loads.index(min(loads))
        loads[rank] += share.stop - share.start + BLOCK
        ranks[share.task.name, share.start] = rank
    return [Share(one.task, one.start, one.stop, ranks[one.task.name, one.start]) for one in shares]


def _cut(recipe: Recipe | None, task: Task, limit: int, chunk: int) -> list[tuple[int, int]]:
    """Ranges whose size is a power of two of regions, so that sums over them are branches of the tensor's own tree."""
    merging = task.action == "merge" and recipe is not None
    # sums of an element method go by blocks, which rows of any length do not end with
    odd = merging and recipe is not None and recipe.by_rows and recipe.method.unit != "row"
    if task.numel <= limit or odd or (merging and recipe is not None and recipe.method.unit == "tensor"):
        return [(0, task.numel)]
    unit = row_length(task.shape) if merging and recipe is not None and recipe.by_rows else chunk
    size = unit
    while 2 * size <= limit:
        size *= 2
    return [(at, min(at + size, task.numel)) for at in range(0, task.numel, size)]
