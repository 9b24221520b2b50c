"""The deviations of a carried donor's units restored, where these are means of several (field `repair` of `align`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion._features import LOOKS, paired

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.maps import Maps
    from fusion._align import Pair
    from fusion.job import Job


def repaired(
    job: Job, pair: Pair, maps: Maps, tensors: dict[str, Tensor], data: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The carried tensors with the donor's statistics in the target's units, and by layer the mean factor of its units;
    where no unit is a mean of several, the tensors as they are."""
    from alignment.repair import carried, restore
    from fusion import sources
    from fusion._blocks import module_of

    module = module_of(pair.config, tensors, job.device)
    donor = sources.load_model(job.model(pair.donor.name), device=job.device)
    batches = list(paired(job, pair, data, "repair", tokens=LOOKS))
    goals = carried(maps, module, donor, [one.donor for one in batches])
    factors = restore(module, goals, [one.target for one in batches])
    state, out = module.state_dict(), dict(tensors)
    for key, part in maps.target.of(state).by_key.items():
        layer, _, last = part.names[0].rpartition(".")
        if layer in factors and last in ("weight", "bias"):
            name = maps.target.of(tensors).by_key[key].names[0]
            out[name] = state[part.names[0]].to("cpu", tensors[name].dtype)
    return out, factors
