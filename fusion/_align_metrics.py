"""What an alignment found, as the step writes it down: matches, couplings and distances by space and by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion._names import kind, split

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.maps import Map, Maps
    from fusion._align import Pair
    from fusion._features import Features

BINS = 16  # of a plan's picture, each way


def report(
    pair: Pair, maps: Maps, tensors: Mapping[str, Tensor], layers: Mapping[int, int] | None, features: Features
) -> dict[str, Any]:
    """What came from where: parts and units that stay the target's, parts of the donor left out, each space's match,
    and how far the donor's weights are from the target's, before and after, relative to these."""
    lacking = maps.lacking(pair.donor.tensors)
    found: dict[str, Any] = {
        "folded": pair.folded,
        "features": features.word,
        "from_target": lacking.kept,
        "units_from_target": lacking.units,
        "left_out": list(lacking.left),
    }
    if features.tables:
        found |= {"tokens": features.tokens, "dead": {name: list(two) for name, two in features.dead.items()}}
    found["distance"] = {"aligned": _distance(pair.target.stored, tensors)}
    shapes = [{name: one.shape for name, one in side.stored.items()} for side in (pair.target, pair.donor)]
    if shapes[0] == shapes[1]:
        found["distance"]["naive"] = _distance(pair.target.stored, pair.donor.stored)
    if layers is not None:
        found["layers"] = {str(own): other for own, other in layers.items()}
    found["spaces"] = {
        space.name: _space(maps, space.name) for space in pair.target.spaces.spaces if space.name in maps.maps
    }
    found["tensors"] = [
        _tensor(name, one, tensors, pair.donor.stored)
        for name, one in pair.target.stored.items()
        if name in tensors and one.is_floating_point()
    ]
    return found


def _space(maps: Maps, name: str) -> dict[str, Any]:
    from alignment.maps import Index, Plan
    from alignment.match._plan import quality

    map, own, other = maps.maps[name], maps.target.by_name[name], maps.source.by_name[name]
    found: dict[str, Any] = {"group": own.group, "units": own.size, "donor_units": other.size}
    found["copies"] = maps.target.copies(own)
    if isinstance(map, Index):
        found["moved"] = int((map.index != map.index.new_tensor(range(own.size))).sum())
        found["matched"] = float((map.index >= 0).double().mean())
    elif isinstance(map, Plan):
        plan = map.even.flatten(0, -2) / map.even.shape[-2] if map.even.dim() == 2 else map.even[0] / own.size
        told = quality(plan)
        found["matched"] = float((map.even.sum(-1) > 0).double().mean())
        found["marginal_error"] = told.marginal_error
        found["effective_support"] = told.effective_support
        found["largest_share"] = told.largest_share
    picture = _picture(map, own.size, other.size)
    return found if picture is None or own.within is not None else {**found, "plan": picture}


def _picture(map: Map, size: int, donors: int) -> list[list[float]] | None:
    """Of each stretch of target units, how much it takes from each stretch of donor units, at most BINS of each."""
    import torch

    from alignment.maps import Index, Matrix, Plan

    rows, columns = min(BINS, size), min(BINS, donors)
    at = torch.arange(size) * rows // size
    mass = torch.zeros(rows, columns, dtype=torch.float64)
    if isinstance(map, Index) and map.index.dim() == 1:
        own = map.index >= 0
        mass.index_put_(
            (at[own], map.index[own] * columns // donors), torch.ones(int(own.sum()), dtype=mass.dtype), True
        )
    elif isinstance(map, Matrix) and map.write.dim() == 2:
        part = map.even if isinstance(map, Plan) else map.write.square()
        wide = torch.zeros(rows, donors, dtype=mass.dtype).index_add_(0, at, part.double().cpu())
        mass.index_add_(1, torch.arange(donors) * columns // donors, wide)
    else:
        return None
    shares: list[list[float]] = (mass / mass.sum(1, keepdim=True).clamp_min(1e-300)).tolist()
    return [[round(share, 3) for share in row] for row in shares]


def _tensor(name: str, target: Tensor, aligned: Mapping[str, Tensor], donor: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far one tensor of the donor is from the target's, over the target's length."""
    parts = split(name)
    found: dict[str, Any] = {"name": name, "layer": parts[1] if parts else None, "kind": kind(name)}
    found |= {"numel": target.numel(), "aligned": _distance({name: target}, aligned)}
    if name in donor and donor[name].shape == target.shape:
        found["naive"] = _distance({name: target}, donor)
    return found


def _distance(target: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    names = [name for name, one in target.items() if name in other and one.is_floating_point()]
    apart = sum(float((target[name].float() - other[name].float()).double().square().sum()) for name in names)
    size = sum(float(target[name].float().double().square().sum()) for name in names)
    return (apart / max(size, 1e-300)) ** 0.5
