"""Whole layers out of named models: passthrough, layer swapping, depth up-scaling; renumbered, with the configuration.

layers: [{model: a, take: [0, 16]}, {model: b, take: [8, 24]}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion._misfit import called, shown
from fusion._names import split
from fusion._params import depths
from fusion._say import nearest

if TYPE_CHECKING:
    from fusion._tasks import Inputs
    from fusion.checkpoint import Source

# Every so many layers one sees the whole text, where a configuration of these does not list what each one sees.
PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Take:
    """A tensor of the result and the one it is a copy of; model "" is the base."""

    name: str
    model: str
    source: str


def stacked(inputs: Inputs, table: Sequence[Mapping[str, Any]]) -> tuple[list[Take], dict[str, Any]]:
    """All tensors of the result with where they come from, and its configuration.

    Tensors outside the layers are the base's, or the first model's. Raises ValueError for a table that can't be read,
    layers that a model doesn't have, and layers that do not fit one another.
    """
    if not table:
        raise ValueError("layers is empty; give at least one {model: NAME, take: [first, end]}")
    target_name, target = inputs.target
    prefix = _prefix(target)
    origins = [_origin(entry, inputs, f"layers[{n}]") for n, entry in enumerate(table)]
    takes = [Take(name, target_name, name) for name in target.entries if (split(name) or ("",))[0] != prefix]
    for place, (model, index) in enumerate([one for part in origins for one in part]):
        source = inputs.source(model)
        own = f"{_prefix(source)}{index}."
        names = [name for name in source.entries if name.startswith(own)]
        takes += [Take(f"{prefix}{place}.{name.removeprefix(own)}", model, name) for name in names]
    _refuse_odd(takes, inputs)
    order = {name: n for n, name in enumerate(target.entries)}
    takes.sort(key=lambda take: order.get(take.name, len(order)))
    return takes, _configured(target, inputs, [one for part in origins for one in part])


def _origin(entry: Mapping[str, Any], inputs: Inputs, place: str) -> list[tuple[str, int]]:
    """(model, layer) of each layer that one entry of the table takes."""
    if not isinstance(entry, Mapping) or set(entry) != {"model", "take"}:
        raise ValueError(f"{place}: {{model: NAME, take: [first, end]}} is needed here, not {entry!r:.80}")
    model, take = entry["model"], entry["take"]
    if model not in inputs.models:
        raise ValueError(f"{place}.model: no model is called '{model}'{nearest(model, inputs.models)}")
    whole = isinstance(take, list | tuple) and len(take) == 2 and all(type(one) is int for one in take)
    if not whole or not 0 <= take[0] < take[1]:
        raise ValueError(f"{place}.take: two whole numbers [first, end] are needed, end not included, not {take!r:.60}")
    depth = _depth(inputs.models[model])
    if take[1] > depth:
        raise ValueError(
            f"{place}.take: {take[0]} to {take[1]} of '{model}', which has {depth} layers (0 to {depth - 1})"
        )
    return [(model, index) for index in range(*take)]


def _prefix(source: Source) -> str:
    """What the names of a model's layers begin with; of several stacks (a vision tower's, a language model's) the one
    that is as deep as the configuration says, or else the one with most numbers."""
    sizes: Counter[str] = Counter()
    for name, entry in source.entries.items():
        if parts := split(name):
            sizes[parts[0]] += entry.numel
    if not sizes:
        raise ValueError(f"{source.path} has no numbered layers to take")
    said = _count(source.config)
    deep = depths(source.entries)
    fitting = [prefix for prefix in sizes if said is None or deep[prefix] == said[1]] or list(sizes)
    return max(fitting, key=lambda prefix: sizes[prefix])


def _depth(source: Source) -> int:
    return depths(source.entries)[_prefix(source)]


def _count(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """What a configuration calls its number of layers, and how many there are."""
    inner = config.get("text_config") or config
    return next(((key, inner[key]) for key in COUNTS if isinstance(inner.get(key), int)), None)


def _refuse_odd(takes: Sequence[Take], inputs: Inputs) -> None:
    """ValueError when layers of two models differ in the shape or the dtype of a tensor."""
    first: dict[str, Take] = {}
    for take in takes:
        parts = split(take.name)
        other = first.setdefault(parts[0] + parts[2] if parts else take.name, take)
        mine = inputs.source(take.model).entries[take.source]
        theirs = inputs.source(other.model).entries[other.source]
        if take.model != other.model and (mine.shape, mine.stored) != (theirs.shape, theirs.stored):
            raise ValueError(
                f"{take.source} of {called(take.model)} is {shown(mine)} ({str(mine.stored)[6:]}), {other.source} of "
                f"{called(other.model)} is {shown(theirs)} ({str(theirs.stored)[6:]}): their layers don't go together"
            )


def _configured(target: Source, inputs: Inputs, origins: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The target's configuration with the new number of layers, and of lists with an entry a layer those taken."""
    config = dict(target.config)
    said = _count(config)
    if said is None:
        return config
    inner = _spelt(config)
    for key, value in inner.items():
        other = key == "architectures" or key.endswith("_token_id")  # as many by chance
        if isinstance(value, list) and len(value) == said[1] and not other:
            inner[key] = [_listed(inputs.source(model).config, key)[index] for model, index in origins]
    inner[said[0]] = len(origins)
    return {**config, "text_config": inner} if config.get("text_config") else inner


def _spelt(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, with the kinds of layers that older spellings leave to a layer's number."""
    inner = dict(config.get("text_config") or config)
    said = _count(config)
    if said is None or inner.get("layer_types"):
        return inner
    kind = str(inner.get("model_type"))
    period = inner.get("sliding_window_pattern", PERIODS.get(kind)) if kind in PERIODS else None
    local = [period is not None and (n + 1) % period != 0 for n in range(said[1])]
    if inner.get("use_sliding_window") and "max_window_layers" in inner:
        local = [n >= inner["max_window_layers"] for n in range(said[1])]
    return inner | ({"layer_types": [LOCAL if one else GLOBAL for one in local]} if any(local) else {})


def _listed(config: Mapping[str, Any], key: str) -> list[Any]:
    value = _spelt(config).get(key)
    if not isinstance(value, list):
        raise ValueError(
            f"the configuration of a model whose layers are taken has no list '{key}', as the first one has"
        )
    return value
