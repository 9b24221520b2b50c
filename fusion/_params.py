"""Parameters that depend on the layer or the tensor: {layers: [0.2, 0.8]} and {match: {"*.mlp.*": 0.3, "*": 0.5}}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from fusion._names import split

_FORMS = "{layers: [first, ..., last]}, {layers: [...], other: value} or {match: {pattern: value}}"


def depths(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has (a vision tower, a language model), by what the names in it begin with."""
    found: dict[str, int] = {}
    for parts in map(split, names):
        if parts is not None:
            found[parts[0]] = max(found.get(parts[0], 0), parts[1] + 1)
    return found


def layer_of(name: str, depths: Mapping[str, int]) -> tuple[int, int] | None:
    """Which layer of how many in its stack a tensor is in; None outside the layers."""
    parts = split(name)
    return None if parts is None else (parts[1], depths[parts[0]])


def varies(value: Any) -> bool:
    """Whether the value depends on the layer or the tensor."""
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, Mapping) for v in value))


def leaves(value: Any, place: str, each: bool = False) -> list[tuple[Any, bool]]:
    """All plain values inside, each with whether it is interpolated over; `each`: a list holds one for each model."""
    if isinstance(value, Mapping):
        if set(value) == {"match"} and isinstance(value["match"], Mapping) and value["match"]:
            return [leaf for one in value["match"].values() for leaf in leaves(one, place)]
        if set(value) in ({"layers"}, {"layers", "other"}) and isinstance(value["layers"], list | tuple):
            if not value["layers"]:
                raise ValueError(f"{place}: layers is empty; give at least one number")
            return [(v, True) for v in value["layers"]] + (leaves(value["other"], place) if "other" in value else [])
        raise ValueError(f"{place}: a parameter that varies is {_FORMS}, not {dict(value)!r:.80}")
    return [leaf for one in value for leaf in leaves(one, place)] if each else [(value, False)]


def resolved(value: Any, name: str, layer: tuple[int, int] | None, place: str) -> Any:
    """The plain value for one tensor.

    `layers` interpolates linearly between any number of anchors, the first at layer 0, the last at the last layer; one
    layer takes the first. Outside the layers, embeddings take the first anchor and the rest the last, or all `other`.
    `match` takes the first pattern that fits the name; ValueError if none does.
    """
    if isinstance(value, list):
        return [resolved(one, name, layer, place) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "match" in value:
        for pattern, one in value["match"].items():
            if fnmatchcase(name, pattern):
                return resolved(one, name, layer, place)
        raise ValueError(f"{place}: no pattern under match fits the tensor '{name}'; add a last one, '*'")
    from fusion.merge._x import is_embedding

    anchors = [float(one) for one in value["layers"]]
    if layer is None:
        if "other" in value:
            return resolved(value["other"], name, layer, place)
        return anchors[0] if is_embedding(name) else anchors[-1]
    index, count = layer
    at = index / (count - 1) * (len(anchors) - 1) if count > 1 else 0.0
    below = min(int(at), len(anchors) - 1)
    above = min(below + 1, len(anchors) - 1)
    return anchors[below] + (anchors[above] - anchors[below]) * (at - below)
