"""A merge at many weightings, in memory: the models are read once and nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.checkpoint import Source


def blends(
    method: str,
    models: Mapping[str, Source | Path | str],  # in the order that the method sees
    weightings: Iterable[Sequence[float]],  # each one number a model
    *,
    base: Source | Path | str | None = None,
    params: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    copy: Sequence[str] | None = None,
    names: Mapping[str, Any] | None = None,  # model -> its table, see alignment.names
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """For each weighting the tensors that `merge_checkpoints` would write with it, by name: for `load_state_dict`.

    All models and one result are in memory at a time; what is copied is the same tensors every time. Raises ValueError
    as `merge_checkpoints` does, for all that headers tell before the first model is read.
    """
    from fusion._merge_plan import planned
    from fusion.checkpoint import region
    from fusion.engine import merge_state_dicts

    asked = [list(weights) for weights in weightings]
    plans = [
        planned(method, models, base=base, weights=one, params=params, only=only, copy=copy, names=names, seed=seed)
        for one in asked
    ]
    if not plans:
        return
    inputs, tasks = plans[0].inputs, plans[0].tasks
    merging = [task for task in tasks if task.action == "merge"]

    def read(source: Source, name: str) -> Tensor:
        return region(source, name).view(source.entries[name].shape)

    copied = {
        task.name: read(inputs.source(task.origin) if task.action == "copy" else inputs.target[1], task.name)
        for task in tasks
        if task.action != "merge"
    }
    every = [{task.name: read(source, task.name) for task in merging} for source in inputs.models.values()]
    below = None if inputs.base is None else {task.name: read(inputs.base, task.name) for task in merging}
    for weights in asked:
        merged = merge_state_dicts(method, every, base=below, weights=weights, seed=seed, **(params or {}))
        yield {task.name: merged[task.name] if task.name in merged else copied[task.name] for task in tasks}
