"""Steps that make one network of several on data, while planning: words, configurations and headers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion import _keys
from fusion._align_check import _family
from fusion._files import header
from fusion._say import bytes_of

if TYPE_CHECKING:
    from alignment.spaces import Spaces
    from fusion.plan import View


def listed(names: str | Sequence[str] | Mapping[str, Any] | None) -> list[str]:
    """Names, of one or several."""
    return [names] if isinstance(names, str) else list(names or ())


def check_zip(view: View) -> None:
    """ValueError, with the place, for what can be seen without weights."""
    fields, place = view.fields, view.place
    for name in ("alpha", "beta"):
        if not 0 <= fields[name] <= 1:
            raise ValueError(f"{place}.{name}: it is {fields[name]} and must be in 0 to 1")
    if fields["alpha"] == 0 and len(fields["models"]) > 2:
        raise ValueError(
            f"{place}.alpha: with 0 a merged unit merges no more, and one of {len(fields['models'])} models has to"
        )
    table = _common(view)
    if fields["until"] is not None and fields["heads"] == "average":
        raise ValueError(
            f"{place}.heads: from layer {fields['until']} on each model keeps its own layers, and a mean head would "
            "read what none of them wrote; give heads: keep"
        )
    if table is None:
        return
    layers = sum(name.endswith(".kv") for name in table.by_name)
    if fields["until"] is not None and not 1 <= fields["until"] <= layers:
        raise ValueError(f"{place}.until: it is {fields['until']}, and there are {layers} layers: 1 to {layers}")
    _enough(view, table, _units(view, table, "to zip"))


def check_least_squares(view: View) -> None:
    """ValueError, with the place, for what can be seen without weights."""
    fields, place = view.fields, view.place
    if not 0 <= fields["ridge"] < math.inf:
        raise ValueError(f"{place}.ridge: it is {fields['ridge']} and must be a number of at least 0")
    models = listed(fields["models"])
    weights = fields["models"].values() if isinstance(fields["models"], dict) else [1.0]
    if not all(0 <= one < math.inf for one in weights) or not sum(weights) > 0:
        raise ValueError(f"{place}.models: weights are numbers of at least 0, and one is larger: {fields['models']}")
    table = _common(view)
    width = fields["width"]
    if not 1 <= width <= len(models):
        raise ValueError(
            f"{place}.width: it is {width}; 1 keeps no unit apart and {len(models)} all of {len(models)} models'"
        )
    if width > 1 and fields["inputs"] == "own":
        raise ValueError(
            f"{place}.inputs: with 'own' every model answers on its own inputs, which the units that others keep apart "
            "have no part in; a width above 1 needs merged or mean"
        )
    if table is None:
        return
    config = view.config(models[0])
    assert config is not None
    if width > 1:
        from fusion._least_squares import widened

        units = _units(view, table, "to keep apart")
        widened(config, table, units, width, len(models), place)
    read = [name for name, uses in table.uses.items() if any(part.axes[number].role == "r" for part, number in uses)]
    _enough(view, table, [name for name in read if table.by_name[name].within is None])


def _common(view: View) -> Spaces | None:
    """The models' table, as far as they are on this machine; ValueError where they do not go together."""
    from alignment import find_family
    from fusion._together import same_sizes

    fields, place = view.fields, view.place
    models, maps = listed(fields["models"]), listed(fields["maps"])
    if len(models) < 2:
        raise ValueError(f"{place}.models: two models or more are made one; given: {', '.join(models) or 'none'}")
    again = next((name for name in models if models.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"{place}.models: '{again}' is given {models.count(again)} times")
    for name in ("tokens", "max_length"):
        if fields[name] < 1:
            raise ValueError(f"{place}.{name}: it is {fields[name]} and must be at least 1")
    bytes_of(fields["shard_size"], f"{place}.shard_size")
    for name in maps:
        made = view.outputs.get(name)
        if made is None or made.step.verb != "align":
            raise ValueError(f"{place}.maps: '{name}' is no output of an align step")
        target, donor = made.fields["target"], made.fields["donor"]
        if target != models[0] or donor not in models[1:]:
            raise ValueError(
                f"{place}.maps: '{name}' writes {donor} in the units of {target}; needed is one of the models "
                f"{', '.join(models[1:])} in those of the first, {models[0]}"
            )
        if made.fields.get("untie"):
            raise ValueError(
                f"{place}.maps: '{name}' has a head of its own (untie), and {target} has not; align {target} to itself "
                f"with untie as well, and give models: [that, {name}]"
            )
    tables: dict[str, Spaces] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in models:
        config = view.config(name)
        if config is None:
            continue
        _family(config, f"{place}.models.{name}")
        if config["model_type"] == "vit":
            raise ValueError(f"{place}.models.{name}: it looks at pictures (vit), and data are texts")
        if view.kinds.get(name) == "directory":
            shapes[name] = header(_keys.model_directory(view.recipe, name)).shapes
            try:
                tables[name] = find_family(config, frozenset(shapes[name]))
            except ValueError as error:
                raise ValueError(f"{place}.models.{name}: {error}") from None
        elif view.kinds.get(view.origin(name)) == "directory":
            tables[name] = find_family(config)
    aligned = [view.outputs[name].fields["donor"] for name in maps]
    for name, table in tables.items():
        if models[0] in tables and name not in aligned:
            same_sizes(tables[models[0]], table, models[0], name, place)
        if models[0] in shapes and name in shapes and name not in aligned and fields.get("heads") != "keep":
            _same_heads(shapes[models[0]], shapes[name], (models[0], name), place)
    return tables.get(models[0])


def _same_heads(
    first: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], names: tuple[str, str], place: str
) -> None:
    """ValueError for heads of other classes, which have no mean."""
    odd = next((key for key, shape in first.items() if other.get(key, shape) != shape), None)
    if odd is not None:
        sizes = [" x ".join(map(str, shapes[odd])) for shapes in (first, other)]
        raise ValueError(
            f"{place}.models: {odd} is {sizes[0]} in {names[0]} and {sizes[1]} in {names[1]}: heads of other classes "
            "have no mean; zip with heads: keep leaves each its own"
        )


def _units(view: View, table: Spaces, what: str) -> list[str]:
    from alignment.zip import zippable

    found = [name for name in zippable(table) if name.startswith("layers.")]
    if not found:
        raise ValueError(
            f"{view.place}: a {table.family} network has no units {what}: those of its MLPs lie within experts"
        )
    return found


def _enough(view: View, table: Spaces, names: Sequence[str]) -> None:
    largest = max(names, key=lambda name: table.by_name[name].size)
    size = table.by_name[largest].size
    if view.fields["tokens"] < size:
        raise ValueError(
            f"{view.place}.tokens: {view.fields['tokens']} tokens cannot tell {size} units of '{largest}' apart; give "
            "at least one for each"
        )
