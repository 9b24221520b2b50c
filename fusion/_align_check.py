"""A step `align` while planning: what is on this machine is checked, from words, configurations and headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion import _keys, words
from fusion._align import same_rows
from fusion._among import check_among
from fusion._files import header
from fusion._say import bytes_of

SILENT = ("bert", "vit")  # families that predict no next token

if TYPE_CHECKING:
    from alignment.spaces import Spaces
    from fusion.plan import View


def check(view: View) -> None:
    """ValueError, with the place, for what can be seen from words, configurations and headers."""
    fields, place = view.fields, view.place
    match, _ = words.parse("match", fields["match"], f"{place}.match")
    if match == "procrustes":
        raise ValueError(
            f"{place}.match: procrustes is what spaces that rotate take by themselves; name a word for units"
        )
    features, _ = words.parse("features", fields["features"], f"{place}.features")
    if features != "weights" and fields["data"] is None:
        raise ValueError(f"{place}: features '{features}' are read off data; give: data")
    if fields["repair"] and fields["data"] is None:
        raise ValueError(f"{place}.repair: deviations are measured on data; give: data")
    if fields["sweeps"] < 1:
        raise ValueError(f"{place}.sweeps: it is {fields['sweeps']} and must be at least 1")
    for size in ("memory", "shard_size"):
        bytes_of(fields[size], f"{place}.{size}")
    tables = {}
    for field in ("target", "donor"):
        name = fields[field]
        config = view.config(name)
        if config is None:
            continue
        _family(config, f"{place}.{field}")
        if features != "weights" and config["model_type"] in SILENT:
            raise ValueError(
                f"{place}.features: '{features}' are those of language models on text, and {name} is none "
                f"({config['model_type']}); give weights"
            )
        if fields["repair"] and config["model_type"] in SILENT:
            raise ValueError(
                f"{place}.repair: it runs language models on text, and {name} is none ({config['model_type']})"
            )
        if name in view.recipe.models and view.kinds.get(name) == "directory":
            from alignment import find_family

            found = header(_keys.model_directory(view.recipe, name))
            try:
                tables[field] = find_family(config, frozenset(found.tensors))
            except ValueError as error:
                raise ValueError(f"{place}.{field}: {error}") from None
    if fields["spaces"] is not None:
        tables = {field: _only(table, fields["spaces"], f"{place}.spaces") for field, table in tables.items()}
    if fields["among"] is not None:
        check_among(view, tables, match, features)
    if len(tables) == 2:
        _comparable(tables["target"], tables["donor"], fields, place)


def _family(config: Mapping[str, Any], place: str) -> None:
    """ValueError for an architecture whose spaces are not written down."""
    family = str(config.get("model_type"))
    known = [word.word for word in words.list_room("families")]
    if family not in known:
        inside = (config.get("text_config") or {}).get("model_type")
        hint = f"; its language model, in text_config, is of family '{inside}'" if inside else ""
        raise ValueError(
            f"{place}: the spaces of '{family}' are not known, those of {', '.join(known)} are{hint}; of another torch "
            "module alignment.trace derives them, from Python"
        )


def _only(table: Spaces, globs: Sequence[str], place: str) -> Spaces:
    try:
        return table.only(globs)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _comparable(target: Spaces, donor: Spaces, fields: Mapping[str, Any], place: str) -> None:
    from alignment._sizes import compare
    from alignment.layers import layer_types

    depths = len(layer_types(target)), len(layer_types(donor))
    if depths[0] != depths[1]:
        if fields["data"] is None:
            raise ValueError(
                f"{place}: {fields['target']} has {depths[0]} layers and {fields['donor']} {depths[1]}; give data, on "
                "which layers are compared"
            )
        return
    if fields["untie"] and not target.ties:
        raise ValueError(f"{place}.untie: the head of {fields['target']} is not tied")
    if fields["features"] == "weights":
        same_rows(target, donor, (fields["target"], fields["donor"]), place)
    try:
        compare(target, donor, fields["features"] != "weights", False)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
