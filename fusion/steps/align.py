"""A donor in a target's architecture and units, so that their weights can be combined."""

from __future__ import annotations

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
    features: str | dict[str, Any] = "weights",
    match: str | dict[str, Any] = "hungarian",
    sweeps: int = 5,
    data: str | None = None,
    among: list[str] | None = None,
    spaces: list[str] | None = None,
    untie: bool = False,
    repair: bool = False,
    memory: str = "4GiB",
    shard_size: str = "5GB",
) -> None:
    """The donor's weights in the names, sizes, units and tokenizer of `target`; what has no counterpart is the target's
    own and is listed in metrics.json. The maps lie in extras/maps.safetensors.

    Of networks of other depth, layers are compared by their states on `data`; by features `activations` units are,
    wherever a linear layer reads them, and tokens may then be other ones. `spaces` are globs of those that may move.
    `among` are several models of one size, target and donor too: the donor goes through the universe of all of them, so
    that the result does not depend on their order. `untie` gives the result a head of its own where the target's is
    tied, so that norm gains fold and the stream may rotate. `repair` gives units that are means of several the
    deviations that theirs have on `data`; of permutations it changes nothing. Sums over pairs of units that take more
    than `memory` are made in several passes over the data.
    """
    if job.rank != 0:
        return
    from fusion import words
    from fusion._align import aligned, likeness, pair_of, written
    from fusion._align_metrics import report
    from fusion._align_repair import repaired
    from fusion._align_report import Alignment
    from fusion._among import through_universe
    from fusion._features import described
    from fusion._say import bytes_of

    seen = words.parse("features", features, f"{job.place}.features")[0] != "weights"
    pair = pair_of(job, target, donor, untie, spaces, text=seen)
    layers = likeness(job, pair, data) if pair.deeper else None
    units = described(job, pair, features, data, layers, bytes_of(memory, f"{job.place}.memory"))
    word, params = words.parse("match", match, f"{job.place}.match")
    through = through_universe(job, pair, among, spaces, sweeps) if among else None
    maps, tensors = aligned(pair, word, params, layers, sweeps, job.seed, units, through)
    factors = None
    if repair:
        assert data is not None, "check asks for it"
        tensors, factors = repaired(job, pair, maps, tensors, data)
    (job.directory / "extras").mkdir(
        exist_ok=True
    )  # apart from the weights, which are all safetensors beside the config
    maps.save(job.directory / "extras" / "maps.safetensors")
    written(job, pair, tensors, bytes_of(shard_size, f"{job.place}.shard_size"))
    found = {"target": target, "donor": donor, "match": word, "params": params, **({"among": among} if among else {})}
    found |= report(pair, maps, tensors, layers, units) | ({} if factors is None else {"repaired": factors})
    job.measured(found)
    for sentence in Alignment(out, target, donor, word, found).sentences:
        print(sentence, flush=True)


def check(view: View) -> None:
    """Raises ValueError for words that no space is matched by, for families that are not there, and for networks on
    this machine that do not correspond; `plan` calls it."""
    from fusion._align_check import check as checked

    checked(view)
