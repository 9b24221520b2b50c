"""Networks of one architecture made one, layer by layer the nearest to all in its outputs (PLeaS, Nasery et al. 2024,
arXiv:2407.02447, in closed form; with each model's own inputs RegMean, Jin et al. 2022, arXiv:2212.09849)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"


def least_squares(
    job: Job,
    *,
    out: str,
    models: list[str] | dict[str, float],
    data: str,
    maps: str | list[str] | None = None,
    width: float = 1.0,
    ridge: float = 0.01,
    inputs: Literal["merged", "mean", "own"] = "merged",
    tokens: int = 16384,
    max_length: int = 256,
    shard_size: str = "5GB",
) -> None:
    """The average of `models` (weights beside them, equal without), its linear layers solved in the order they run for
    outputs nearest the models' on `data`; a larger `ridge` keeps them nearer the average.

    `maps` are align steps: their outputs stand for their donors, in the first model's units. A `width` above 1 keeps
    that many more units of each MLP apart, those that differ most: the output's MLPs are wider. `inputs` are the merged
    network's, the `mean` of the models', or each model's `own` (RegMean).
    """
    if job.rank != 0:
        return
    from fusion._least_squares import solved
    from fusion._say import bytes_of
    from fusion._together import opened
    from fusion._together_check import listed
    from fusion._whole import write_whole

    networks = opened(job, listed(models), listed(maps))
    weights = list(models.values()) if isinstance(models, dict) else [1.0] * len(models)
    shares = [one / sum(weights) for one in weights]
    tensors, config, report = solved(job, networks, data, shares, width, ridge, inputs, tokens, max_length)
    write_whole(job, job.directory, tensors, config, networks.source, bytes_of(shard_size, f"{job.place}.shard_size"))
    metrics = {
        "networks": dict(zip(networks.names, shares)),
        "width": width,
        "ridge": ridge,
        "inputs": inputs,
        **report,
    }
    job.measured(metrics)


def check(view: View) -> None:
    """Raises ValueError for numbers out of range, maps that are of other models, models that differ in sizes, a width
    that a family has no place for; `plan` calls it."""
    from fusion._together_check import check_least_squares

    check_least_squares(view)
