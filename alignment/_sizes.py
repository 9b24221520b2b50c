"""Two tables of spaces beside each other: what corresponds though its size differs, and what stays the target's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignment._acts import Map, Matrix, Plan
from alignment.spaces import Part, Space, Spaces

BASE = 10000.0  # of rotary frequencies, where a configuration names none
BASES = {"gemma3_text": 1e6, "mixtral": 1e6}  # families whose class takes another one then; Gemma 3's slide with BASE
INSIDE = ("qk", "qk_rest", "qk_norm")  # queries and keys: a head can do without the donor's


def compare(target: Spaces, donor: Spaces, vocab: bool, layers: bool) -> dict[str, str]:
    """The target's spaces that stay its own, each with the reason; all others correspond, sizes may differ.

    Raises ValueError where two networks do not correspond at all.
    """
    apart: dict[str, str] = {}
    for space in target.spaces:
        other = donor.by_name.get(space.name)
        if space.name == "vocabulary" and vocab:
            continue
        if other is None and layers and space.name.startswith("layers."):
            continue
        if inside_queries(space.name):
            reason = _queries(space, other, target, donor)
            if reason:
                apart[space.name] = reason
            continue
        if other is None:
            raise ValueError(
                f"the target has a space '{space.name}', and the donor, a {donor.family} network, has none"
            )
        if space.group != other.group or (space.size != other.size and space.group == "fixed"):
            hint = "; say by `vocab` which rows correspond" if space.name == "vocabulary" else ""
            raise ValueError(
                f"space '{space.name}' is {space.size} units with the group '{space.group}' in the target, and "
                f"{other.size} with '{other.group}' in the donor{hint}"
            )
    for space in donor.spaces:
        spare = inside_queries(space.name) or (layers and space.name.startswith("unmatched."))
        if space.name not in target.by_name and not spare:
            raise ValueError(
                f"the donor has a space '{space.name}', and the target, a {target.family} network, has none"
            )
        if inside_queries(space.name) and space.name not in target.by_name and not space.name.startswith("unmatched."):
            layer = space.name.rpartition(".")[0]
            reason = f"queries and keys of the donor have a space '{space.name}' and the target's have none"
            apart.update(
                {name: reason for name in target.by_name if name.rpartition(".")[0] == layer and inside_queries(name)}
            )
    for name in list(apart):  # queries and keys go together
        layer, reason = name.rpartition(".")[0], apart[name]
        apart.update({f"{layer}.{one}": reason for one in INSIDE if f"{layer}.{one}" in target.by_name})
    return apart


def inside_queries(name: str) -> bool:
    return name.rpartition(".")[2] in INSIDE


def _queries(space: Space, other: Space | None, target: Spaces, donor: Spaces) -> str:
    """Why queries and keys do not correspond; nothing where they do."""
    if other is None:
        return f"queries and keys of the donor have no space '{space.name}'"
    if space.group != other.group:
        return f"'{space.name}' has the group '{space.group}' in the target and '{other.group}' in the donor"
    if space.group.startswith("pair"):
        if space.size != other.size:
            return f"'{space.name}' turns {space.size} coordinates in the target and {other.size} in the donor"
    return mixed(space, other, target, donor)


def mixed(space: Space, other: Space, target: Spaces, donor: Spaces) -> str:
    """Why the inside of queries and keys cannot be carried at all, whatever the map; nothing where it can."""
    if space.group.startswith("pair") and space.group != "pair scales" and _rotary(target) != _rotary(donor):
        return "rotary embeddings turn at other frequencies in target and donor"
    turning = space.name.removesuffix("_rest") in target.by_name
    if space.name.endswith(".qk_rest") and turning and space.size != other.size and inside_scale(target) is None:
        # the root of the whole head's size is divided by, and what turns can take no factor
        return f"heads have {space.size} coordinates that do not turn in the target and {other.size} in the donor"
    return ""


def _rotary(spaces: Spaces) -> dict[str, dict[str, Any]]:
    """What a config says about rotary frequencies, by type of layer where types differ, in one spelling."""
    config: dict[str, Any] = json.loads(spaces.config) if spaces.config else {}
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    types = {name: one for name, one in given.items() if isinstance(one, dict)} or {"full_attention": given}
    local = config.get("rope_local_base_freq", BASE if spaces.family == "gemma3_text" else None)
    if local is not None:
        types.setdefault("sliding_attention", {"rope_theta": local})
    base = config.get("rope_theta") or config.get("rotary_emb_base") or BASES.get(spaces.family, BASE)
    return {name: {"rope_theta": base, **_frequencies(one)} for name, one in types.items()}


def _frequencies(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of one type's parameters says how fast coordinates turn; how many do is the space's size."""
    found = {"rope_type" if name == "type" else name: value for name, value in given.items()}
    return {n: v for n, v in found.items() if n != "partial_rotary_factor" and v not in (None, "default")}


def comparable(
    target: Spaces,
    donor: Spaces,
    blocks: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    apart: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Keys of the parts that correspond, and those that do not though both networks have them, with the reason."""
    keys, kept = [], {}
    for key in blocks[0]:
        if key not in blocks[1]:
            continue
        own, other = target.by_key[key], donor.by_key[key]
        reason = next(
            (apart[axis.space] for axis in own.axes if axis.space is not None and axis.space in apart), ""
        ) or _differ(own, other, blocks[0][key], blocks[1][key])
        if reason:
            kept[key] = reason
        else:
            keys.append(key)
    return keys, kept


def _differ(own: Part, other: Part, one: Tensor, two: Tensor) -> str:
    if [(axis.space, axis.role) for axis in own.axes] != [(axis.space, axis.role) for axis in other.axes]:
        return "its axes are of other spaces in target and donor"
    for number, axis in enumerate(own.axes):
        if axis.space in (None, "vocabulary") and one.shape[number] != two.shape[number]:
            return f"axis {number} has {one.shape[number]} entries in the target and {two.shape[number]} in the donor"
    return ""


def resized(target: Spaces, donor: Spaces) -> frozenset[str]:
    """Spaces of both with other sizes."""
    both = (space for space in target.spaces if space.name in donor.by_name and space.group != "fixed")
    return frozenset(space.name for space in both if space.size != donor.by_name[space.name].size)


def scaled(maps: Mapping[str, Map], target: Spaces, donor: Spaces) -> dict[str, Map]:
    """The maps with the factors that a change of width needs.

    A norm divides by the root mean square over all units, so a stream in n of m directions grows by sqrt(n / m); what
    queries and keys give is divided by the root of the head's size.
    """
    out = dict(maps)
    for name, map in maps.items():
        space = target.by_name[name]
        if not isinstance(map, Matrix) or isinstance(map, Plan) or space.size == donor.by_name[name].size:
            continue
        n, m = map.write.shape[-2:]
        if space.group.startswith("orthogonal"):
            factor = (n / m) ** 0.5
            out[name] = Matrix(map.write * factor, map.read / factor)
        elif inside_queries(name) and inside_scale(target) is None:
            factor = (n / m) ** 0.25
            out[name] = Matrix(map.write * factor, map.read * factor)
    return out


def inside_scale(spaces: Spaces) -> float | None:
    """The number by whose root a config divides products of queries and keys; None for the head's size."""
    return json.loads(spaces.config).get("query_pre_attn_scalar") if spaces.config else None
