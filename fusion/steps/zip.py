"""Networks of one architecture zipped into one of their size (ZipIt, Stoica et al. 2023, arXiv:2305.03053)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"


def zip(
    job: Job,
    *,
    out: str,
    models: list[str],
    data: str,
    until: int | None = None,
    alpha: float = 0.3,
    beta: float = 0.125,
    heads: Literal["keep", "average"] = "average",
    maps: str | list[str] | None = None,
    tokens: int = 16384,
    max_length: int = 256,
    shard_size: str = "5GB",
) -> None:
    """The models' neurons merged with the most correlated ones on `data`, of other models or of their own; the stream
    and heads, which hold others, are matched one for one by weights first (or by the align steps in `maps`).

    From layer `until` on each model keeps its own layers, with `heads: keep` its head: the output is then the merged
    trunk with the first model's, and heads/NAME in it the same with another's.
    """
    if job.rank != 0:
        return
    from fusion._say import bytes_of
    from fusion._together_check import listed
    from fusion._zip import in_first_units, written, zipped

    networks = in_first_units(job, models, listed(maps))
    count = sum(name.endswith(".kv") for name in networks.spaces.by_name)
    last = count if until is None else until
    found = zipped(job, networks, data, last, alpha, beta, tokens, max_length)
    written(job, networks, found, last, heads == "keep", bytes_of(shard_size, f"{job.place}.shard_size"))
    metrics = {"networks": list(networks.names), "until": last, "layers": count, "heads": heads, **found.report}
    job.measured(metrics)


def check(view: View) -> None:
    """Raises ValueError for numbers out of range, models whose units are not known or that differ in sizes, and layers
    kept without their heads; `plan` calls it."""
    from fusion._together_check import check_zip

    check_zip(view)
