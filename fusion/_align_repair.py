"""The deviations of a carried donor's units restored, where these are means of several (field `repair` of `align`)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fusion._blocks import Flow, blocks_of, module_of
from fusion._features import LOOKS, paired
from fusion._together import module_spaces

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.maps import Maps
    from alignment.repair import Goal
    from fusion._align import Pair
    from fusion.job import Job


def repaired(
    job: Job, pair: Pair, maps: Maps, tensors: dict[str, Tensor], data: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The carried tensors with the donor's statistics in the target's units, and by layer the mean factor of its units;
    where no unit is a mean of several, the tensors as they are."""
    from alignment.repair import carried
    from fusion import sources

    module = module_of(pair.config, tensors, job.device)
    donor = sources.load_model(job.model(pair.donor.name), device=job.device)
    batches = list(paired(job, pair, data, "repair", tokens=LOOKS))
    goals = carried(maps, module, donor, [one.donor for one in batches])
    factors = _restored(job, pair.config, module, goals, [one.target for one in batches])
    state, out = module.state_dict(), dict(tensors)
    for key, part in maps.target.of(state).by_key.items():
        layer, _, last = part.names[0].rpartition(".")
        if layer in factors and last in ("weight", "bias"):
            name = maps.target.of(tensors).by_key[key].names[0]
            out[name] = state[part.names[0]].to("cpu", tensors[name].dtype)
    return out, factors


def _restored(
    job: Job, config: dict[str, Any], module: Any, goals: Mapping[str, Goal], batches: list[dict[str, Tensor]]
) -> dict[str, float]:
    """The factors of all layers, which are restored in place: those of a block on the states that the restored blocks
    before it give, so that each runs over a block and not over the network."""
    from alignment.repair import restore

    spaces = module_spaces(config, module)
    blocks = blocks_of(spaces)
    parts = groupby(goals, lambda name: next((one for one in blocks if name.startswith(f"{one}.")), ""))
    factors: dict[str, float] = {}
    flow: Flow | None = None
    for block, names in job.progress([(block, list(names)) for block, names in parts], f"{job.name}: repair"):
        if not block:  # a projection before the blocks, or after them
            factors |= restore(module, {name: goals[name] for name in names}, batches)
            continue
        flow = flow or Flow(module, spaces, batches)
        while flow.name != f"{block}.":
            flow.advance()
        given = [flow.given(number) for number in range(len(batches))]
        found = restore(flow.block, {name.removeprefix(flow.name): goals[name] for name in names}, given)
        factors |= {flow.name + name: factor for name, factor in found.items()}
    return factors
