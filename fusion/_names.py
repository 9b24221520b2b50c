"""Names of tensors: which of one model is which of another, and which layer it is in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase


def renamed(names: Iterable[str], table: Mapping[str, str] | None, model: str) -> dict[str, str]:
    """The target's name -> this model's own, by the first pattern that fits; a name that none fits stays as it is.

    table: {pattern of own names: pattern of the target's}, each * of the one is what a * of the other stood for.
    """
    found: dict[str, str] = {}
    used: set[str] = set()
    for own in names:
        target = own
        for pattern, into in (table or {}).items():
            if fnmatchcase(own, pattern):
                target = _filled(own, pattern, into, model)
                used.add(pattern)
                break
        if target in found:
            raise ValueError(f"names of {model}: {found[target]} and {own} would both be {target}")
        found[target] = own
    for pattern in table or {}:
        if pattern not in used:
            raise ValueError(f"names of {model}: no tensor is called like '{pattern}'")
    return found


def _filled(own: str, pattern: str, into: str, model: str) -> str:
    if into.count("*") > pattern.count("*"):
        raise ValueError(f"names of {model}: '{into}' has more * than '{pattern}'")
    regex = "(.*)".join(re.escape(part) for part in pattern.split("*"))
    match = re.fullmatch(regex, own)
    if match is None:
        raise ValueError(f"names of {model}: '{pattern}' may hold *, and no other wildcard")
    stars = iter(match.groups())
    return "".join(part if part != "*" else next(stars) for part in re.split(r"(\*)", into))


def split(name: str) -> tuple[str, int, str] | None:
    """("model.layers.", 7, ".mlp.up_proj.weight"): the first component that is a number; None when there is none."""
    found = re.match(r"((?:[^.]*[^.\d][^.]*\.|\.)*)(\d+)(\..*|$)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def kind(name: str) -> str:
    """A name without its layer: mlp.up_proj.weight, or all of it outside the layers."""
    parts = split(name)
    return parts[2].lstrip(".") if parts else name
