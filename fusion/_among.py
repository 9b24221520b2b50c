"""A step `align` among several models: the donor goes into the target's units through the universe of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fusion._align import Pair, Side, _other_tokens, side
from fusion._say import nearest
from fusion._whole import read_whole

if TYPE_CHECKING:
    from alignment.maps import Maps
    from alignment.spaces import Spaces
    from fusion.job import Job
    from fusion.plan import View


def through_universe(job: Job, pair: Pair, among: Sequence[str], only: Sequence[str] | None, sweeps: int) -> Maps:
    """The donor's maps into the target's units, consistent with those of all the other models named.

    Raises ValueError for a model of other sizes or tokens.
    """
    from alignment import Maps, find_family, universe
    from alignment.universe import between

    sides: dict[str, Side] = {pair.target.name: pair.target, pair.donor.name: pair.donor}
    for name in among:
        if name not in sides:
            source = job.source(name)
            _other_tokens(job, pair.target.source, source, pair.target.name, name, False)
            table = find_family(source.config, frozenset(source.entries))
            sides[name] = side(name, source, read_whole(source), table, pair.folded, only)
    table = pair.target.spaces
    tensors = []
    for name in among:
        same_spaces(table, sides[name].spaces, (pair.target.name, name), job.place)
        tensors.append(Maps(sides[name].spaces, table, {}).carry(sides[name].tensors))  # in the target's spelling
    maps = dict(zip(among, universe(tensors, table, sweeps=sweeps, seed=job.seed)))
    return replace(between(maps[pair.target.name], maps[pair.donor.name]), source=pair.donor.spaces)


def same_spaces(target: Spaces, other: Spaces, names: tuple[str, str], place: str) -> None:
    """ValueError where a model has other spaces than the target: a universe has one size."""
    if target.spaces != other.spaces:
        differ = next(
            space.name
            for space in (*target.spaces, *other.spaces)
            if target.by_name.get(space.name) != other.by_name.get(space.name)
        )
        raise ValueError(
            f"{place}.among: {names[0]} and {names[1]} are networks of other sizes ('{differ}'), and have no universe "
            f"in common; write {names[1]} in the sizes of {names[0]} first: align: {{out: ..., target: {names[0]}, "
            f"donor: {names[1]}}}"
        )


def check_among(view: View, tables: Mapping[str, Spaces], match: str, features: str) -> None:
    """ValueError, with the place, for what can be seen without weights."""
    fields, place = view.fields, view.place
    among: list[str] = fields["among"]
    again = next((name for name in among if among.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"{place}.among: '{again}' is given {among.count(again)} times")
    for field in ("target", "donor"):
        if fields[field] not in among:
            raise ValueError(
                f"{place}.among: the {field} '{fields[field]}' is not among {', '.join(among)}"
                f"{nearest(fields[field], among)}"
            )
    if match != "hungarian" or features != "weights":
        given = f"match: {match}" if match != "hungarian" else f"features: {features}"
        raise ValueError(
            f"{place}.among: several models go into one universe by weights and one for one (hungarian); leave out "
            f"{given}, or align the models to one of them"
        )
    if len(tables) == 2:
        same_spaces(tables["target"], tables["donor"], (fields["target"], fields["donor"]), place)
