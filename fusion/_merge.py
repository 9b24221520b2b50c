"""Checkpoints merged from disk to disk in a fixed budget of memory; killed and begun again it goes on where it was."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fusion import _carry
from fusion._deal import Share, dealt, fitted, largest_first, threads_here
from fusion._joint import Joint
from fusion._libc import keep_freed_memory
from fusion._manifest import Manifest
from fusion._merge_metrics import metrics
from fusion._merge_plan import Planned, notes, planned
from fusion._params import layer_of
from fusion._partial import PLAN, Wait, alone, begun, left_over, meet, patient, prepare, refuse_place
from fusion._regions import Reader, Work
from fusion._room import room
from fusion._say import bytes_of
from fusion._stream import Stream
from fusion.checkpoint import Entry, Shard, Source, Writer, layout, shard


class Bar(Protocol):
    """What shows progress."""

    def advance(self, count: int = 1) -> None: ...


@dataclass(frozen=True)
class Merged:
    """A finished merge: where it lies and what was read off it (metrics.json's content)."""

    path: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """How a merge is run; nothing here changes a byte of what comes out."""

    memory: int = 512 << 20
    threads: int = 1
    chunk: int | None = None
    device: str = "cpu"
    rank: int = 0
    world: int = 1
    wait: Wait | None = None
    progress: Callable[[int, str], AbstractContextManager[Bar]] | None = None
    say: Callable[[str], None] = print


def merge_checkpoints(
    method: str | None,  # None: `layers` alone says what is written
    models: Mapping[str, Source | Path | str],  # in the order that the method sees
    out: Path | str,
    *,
    base: Source | Path | str | None = None,
    weights: Sequence[float] | None = None,  # 1 each when left out
    params: Mapping[str, Any] | None = None,
    post: Sequence[str | Mapping[str, Any]] | None = None,
    only: Sequence[str] | None = None,
    copy: Sequence[str] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    names: Mapping[str, Any] | None = None,  # model -> its table, see alignment.names
    statistics: Mapping[str, Path | str] | None = None,  # model -> safetensors; "base": the base's
    dtype: str | None = None,
    seed: int = 0,
    memory: str | int = "512MiB",
    threads: int | None = None,  # the machine's cores when left out
    chunk: int | None = None,  # elements of a region
    shard_size: str | int = "5GB",
    tokenizer: str | None = None,  # whose tokenizer and templates are carried; "base", or a model
    rank: int = 0,
    world: int = 1,
    wait: Wait | None = None,
    progress: Callable[[int, str], AbstractContextManager[Bar]] | None = None,
    device: str = "cpu",
) -> Merged:
    """The merged model in the directory `out`, which is there when it is whole and not before.

    Work is done in OUT.partial; the same call continues it after a kill. Raises ValueError with a sentence for models
    that do not go together, parameters the method can't take, numbers that are not finite, a full disk, and an `out`
    that exists.
    """
    out = Path(out)
    refuse_place(out)
    plan = planned(
        method,
        models,
        base=base,
        weights=weights,
        params=params,
        post=post,
        only=only,
        copy=copy,
        layers=layers,
        names=names,
        statistics=statistics,
        dtype=dtype,
        seed=seed,
        shard_size=bytes_of(shard_size, "shard_size"),
        tokenizer=tokenizer,
    )
    run = Run(bytes_of(memory, "memory"), threads_here(threads), chunk, device, rank, world, wait, progress)
    _fitted(plan, run)
    partial = out.with_name(f"{out.name}.partial")
    with room(partial), alone(partial) if rank == 0 else nullcontext():
        found = merge_into(plan, partial, run)
        if rank == 0:
            (partial / ".lock").unlink()
            os.rename(partial, out)
            _flushed(out.parent)
    return Merged(out, found)


def merge_into(plan: Planned, directory: Path, run: Run) -> dict[str, Any]:
    """Writes the checkpoint into a directory that a killed run may have begun; its metrics (rank 0's; others: none)."""
    start = time.monotonic()
    chunk, slots = _fitted(plan, run)  # first: there may be too little memory
    shards = layout((task.entry for task in plan.tasks), plan.shard_size)
    extras = _extra_shards(plan)
    wait = run.wait or patient
    if run.rank == 0:
        for note in notes(plan, run.memory):
            run.say(note)
        prepare(plan, directory, shards, extras, run.say)
    else:
        wait(lambda: begun(directory, plan), "rank 0 to prepare the files")
    writer = Writer(directory, shards)
    by_products = Writer(directory / "extras", extras) if extras else None
    manifest = Manifest(directory, run.rank)
    method = plan.recipe.method if plan.recipe else None
    # what works by region would spend its time on the way to an accelerator and back
    device = run.device if method is not None and method.unit == "tensor" else "cpu"
    shares = dealt(plan.recipe, largest_first(method, plan.tasks), run.world, chunk)
    works = [_work(plan, share) for share in shares if share.rank == run.rank]
    before = torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(1)  # tensors run side by side instead: how a sum is split over threads would change its bits
    reader = Reader(plan.inputs, plan.recipe, plan.sidecars, device)
    show = run.progress(len(works), "merging") if run.progress else nullcontext()
    try:
        with show as bar:
            stream = Stream(
                reader,
                writer,
                by_products,
                manifest,
                chunk=chunk,
                slots=slots,
                memory=run.memory,
                told=(lambda task: bar.advance()) if bar is not None else (lambda task: None),
            )
            together = [work for work in works if _is_joint(plan, work)]
            everywhere = [work for work in (_work(plan, share) for share in shares) if _is_joint(plan, work)]
            if everywhere and plan.recipe is not None:
                rounds = max(plan.recipe.method.needed(work.params) for work in everywhere)
                joint = Joint(stream, directory, run.rank, run.world, chunk, wait, plan.scope == "model")
                joint.settle(together, rounds)
            stream.run(works)
    finally:
        torch.set_num_threads(before)
    writer.sync()
    if by_products is not None:
        by_products.sync()
    meet(directory, run.rank, run.world, wait)
    found: dict[str, Any] = {}
    if run.rank == 0:
        manifest.reload()
        found = _finish(plan, directory, shards, shares, writer, manifest)
        found |= {
            "seconds": round(time.monotonic() - start, 3),
            "bytes_read": reader.bytes,
            "bytes_written": sum(one.size for one in (*shards, *extras)),
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    for one in (writer, by_products, manifest):
        if one is not None:
            one.close()
    return found


def _fitted(plan: Planned, run: Run) -> tuple[int, int]:
    return fitted(len(plan.inputs.models), run.memory, run.threads, run.chunk)


def _work(plan: Planned, share: Share) -> Work:
    task = share.task
    layer = layer_of(task.name, plan.depths)
    recipe = plan.recipe
    merging = recipe is not None and task.action == "merge"
    params = recipe.method.resolve(recipe.params, task.name, layer) if merging and recipe is not None else {}
    return Work(task, layer, params, share.start, share.stop, share.whole)


def _is_joint(plan: Planned, work: Work) -> bool:
    """Whether its statistics are not its own."""
    if plan.recipe is None or work.task.action != "merge" or work.task.numel == 0:
        return False
    return not work.whole or (plan.scope == "model" and plan.recipe.method.needed(work.params) > 0)


def _extra_shards(plan: Planned) -> tuple[Shard, ...]:
    """One file for each by-product: (K, *shape) of every merged tensor."""
    if plan.recipe is None:
        return ()
    k = len(plan.inputs.models)
    return tuple(
        shard(
            f"{name}.safetensors",
            [
                Entry(f"{name}/{task.name}", (k, *task.shape), getattr(torch, kind), getattr(torch, kind))
                for task in plan.tasks
                if task.action == "merge"
            ],
        )
        for name, kind in plan.recipe.method.extras.items()
    )


def _finish(
    plan: Planned,
    directory: Path,
    shards: Sequence[Shard],
    shares: Sequence[Share],
    writer: Writer,
    manifest: Manifest,
) -> dict[str, Any]:
    """Everything beside the weights; the metrics."""
    checksums = {}
    for task in plan.tasks:
        whole = manifest.has(task.name)
        checksums[task.name] = manifest.checksum(task.name) if whole else writer.checksum(task.name, 0, task.bytes)
    _carry.carry(directory, plan.config, shards, plan.inputs.target[1], plan.speaker)
    _carry.write(directory / "merge.json", {**plan.provenance, "tensors": checksums})
    found = metrics(plan, shares, manifest)
    (directory / PLAN).unlink()  # the other ranks take it for the end
    for old in left_over(directory):
        old.unlink()
    for file in directory.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            _flushed(file)
    _flushed(directory)
    return found


def _flushed(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
