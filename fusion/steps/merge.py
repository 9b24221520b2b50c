"""Models of one architecture become one: by a method on their weights, or by whole layers taken from each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"
BUILDS = False


def files(fields: Mapping[str, Any]) -> list[str]:
    """Files that the result depends on besides models and data: statistics."""
    from fusion._merge_step import statistics_of

    return list(statistics_of(fields).values())


def check(view: View) -> list[str]:
    """Raises ValueError for parameters that the method can't take, and for models that do not go together as far as
    they are on this machine; else what the plan should say. `plan` calls it."""
    from fusion._merge_check import check as checked

    return checked(view)


def merge(
    job: Job,
    *,
    out: str,
    method: str | None = None,
    base: str | None = None,
    models: dict[str, Any] | list[str] | None = None,
    params: dict[str, Any] | None = None,
    post: list[Any] | None = None,
    layers: list[dict[str, Any]] | None = None,
    only: list[str] | None = None,
    copy: list[str] | None = None,
    statistics: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    rank: int | None = None,
    shard_size: str = "5GB",
    memory: str = "512MiB",
) -> None:
    """The models merged by `method` around `base`, its parameters in `params` or beside a model (`{weight: 0.5,
    density: 0.3, statistics: FILE, names: {...}}`), then the words of `post`; or, by `layers`, whole layers of each.

    `only` and `copy` are globs of tensors that merge and that stay the base's. Adapters without a base become an
    adapter (of rank `rank`). Any number of ranks, the same bytes.
    """
    from fusion._merge_check import adapters_alone, options

    fields = {
        **{"method": method, "base": base, "models": models, "params": params, "post": post, "layers": layers},
        **{"only": only, "copy": copy, "statistics": statistics, "dtype": dtype, "tokenizer": tokenizer, "rank": rank},
    }
    given = options(fields, job.place, job.recipe.base, job.seed)
    found = (
        _adapter(job, fields, given)
        if adapters_alone(fields, job.recipe)
        else _model(job, fields, given, shard_size, memory)
    )
    if job.rank == 0:
        job.measured(found)


def _model(job: Job, fields: dict[str, Any], given: dict[str, Any], shard_size: str, memory: str) -> dict[str, Any]:
    from fusion._deal import threads_here
    from fusion._merge import Run, merge_into
    from fusion._merge_plan import planned
    from fusion._merge_step import asked
    from fusion._say import bytes_of

    names = asked(fields, job.place, job.recipe.base).models
    plan = planned(
        fields["method"],
        {name: job.source(name) for name in names},
        base=job.source(fields["base"]) if fields["base"] else None,
        shard_size=bytes_of(shard_size, "shard_size"),
        **given,
    )
    run = Run(
        memory=bytes_of(memory, "memory"),
        threads=threads_here(None),
        device=job.device,
        rank=job.rank,
        world=job.world,
        wait=job.wait,
        progress=job.progress,
    )
    return {**merge_into(plan, job.directory, run), "base": fields["base"]}


def _adapter(job: Job, fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's work: adapters are small."""
    from fusion._adapter_merge import merge_adapters

    if job.rank > 0:
        return {}
    names = list(fields["models"])
    place = job.directory / "adapter"
    if place.exists():  # a killed run's
        shutil.rmtree(place)
    merge_adapters(
        fields["method"],
        {name: job.source(name).path for name in names},
        place,
        weights=given["weights"],
        rank=fields["rank"],
        params=given["params"],
        seed=job.seed,
        progress=job.progress,
    )
    for file in place.iterdir():
        os.replace(file, job.directory / file.name)
    place.rmdir()
    return {"method": fields["method"], "params": given["params"], "models": names, "weights": given["weights"]}
