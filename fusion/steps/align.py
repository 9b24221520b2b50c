"""A donor in a target's architecture and units, so that their weights can be combined."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"


def align(
    job: Job,
    *,
    out: str,
    target: str,
    donor: str,
    features: str = "weights",
    match: str | dict[str, Any] = "hungarian",
    sweeps: int = 5,
    data: str | None = None,
    untie: bool = False,
    shard_size: str = "5GB",
) -> None:
    """The donor's weights in the names, sizes, units and tokenizer of `target`; what has no counterpart is the target's
    own and is listed in metrics.json. The maps lie in extras/maps.safetensors.

    Of networks of other depth, layers are compared by their states on `data`. `untie` gives the result a head of its
    own where the target's is tied, so that norm gains fold and the stream may rotate.
    """
    if job.rank != 0:
        return
    from fusion import words
    from fusion._align import aligned, likeness, pair_of, report, written
    from fusion._say import bytes_of

    pair = pair_of(job, target, donor, untie)
    layers = likeness(job, pair, data) if pair.deeper else None
    word, params = words.parse("match", match, f"{job.place}.match")
    maps, tensors = aligned(pair, word, params, layers, sweeps, job.seed)
    (job.directory / "extras").mkdir(
        exist_ok=True
    )  # apart from the weights, which are all safetensors beside the config
    maps.save(job.directory / "extras" / "maps.safetensors")
    written(job, pair, tensors, bytes_of(shard_size, f"{job.place}.shard_size"))
    found = {"target": target, "donor": donor, "match": word, "params": params, **report(pair, maps, tensors, layers)}
    (job.directory / "metrics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check(view: View) -> None:
    """Raises ValueError for words that no space is matched by, for families that are not there, and for networks on
    this machine that do not correspond; `plan` calls it."""
    from fusion._align_check import check as checked

    checked(view)
