"""A merge step while planning: as much of it as is on this machine is checked, from headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion import _keys
from fusion._composed import COMPOSED
from fusion._merge_step import asked
from fusion._say import bytes_of
from fusion.checkpoint import Checkpoint, Source
from fusion.recipe import Recipe

if TYPE_CHECKING:
    from fusion.plan import View

PASSED = ("post", "only", "copy", "layers", "dtype", "tokenizer")
BASE = "base"


def options(fields: Mapping[str, Any], place: str, folder: Path, seed: int) -> dict[str, Any]:
    """The keywords of `merge_checkpoints` that fields stand for, without models and how it is run."""
    given = {name: fields.get(name) for name in PASSED}
    if given["tokenizer"] is not None and given["tokenizer"] == fields.get("base"):
        given["tokenizer"] = BASE
    layers = given["layers"]
    if layers is not None:
        for name in ("params", "post", "only", "copy"):
            if fields.get(name):
                raise ValueError(f"{place}: layers takes whole layers as they are; '{name}' has nothing to say to that")
    return {**given, **asked(fields, place, folder).options, "seed": seed}


def adapters_alone(fields: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether an adapter is to come out: all models are adapters, and there is no base to add them to."""
    from fusion._adapter_files import is_adapter

    models = fields.get("models") or []
    refs = [recipe.models.get(name) for name in models]
    if fields.get("base") is not None or not refs:
        return False
    return all(
        ref is not None
        and ref.base is not None
        and (ref.hub is not None or is_adapter(_keys.model_directory(recipe, ref.name)))
        for ref in refs
    )


def check(view: View) -> list[str]:
    """Raises ValueError, with the place, for parameters that the method can't take and models that do not match;
    what else a reader of the plan should know."""
    from fusion._merge_plan import notes, planned
    from fusion._method import Method, weighed

    fields, place = view.fields, view.place
    given = options(fields, place, view.recipe.base, view.recipe.seed)
    said = asked(fields, place, view.recipe.base)
    for name in ("memory", "shard_size"):
        bytes_of(fields[name], f"{place}.{name}")
    for model, file in said.statistics.items():
        if not file.is_file():
            raise ValueError(f"{place}: statistics of {model}: there is no file {file}")
    method = fields.get("method")
    alone = adapters_alone(fields, view.recipe)
    if fields.get("rank") is not None and not alone:
        raise ValueError(f"{place}.rank: it is of an adapter, and the models here are not adapters without a base")
    if method is not None:
        found = Method.of(method)
        if found.unit == "adapter" and not alone:
            raise ValueError(f"{place}: {method} merges adapters into an adapter; give adapters, and no base")
        params = dict(said.params) | ({"rank": fields["rank"]} if alone and found.unit == "adapter" else {})
        found.check(
            {name: value for name, value in params.items() if value is not None},
            len(said.models),
            base=fields.get("base") is not None or alone,
            weights=weighed(said.weights),
            place=f"{place}.params",
        )
    if alone:
        for name in (*PASSED, "statistics"):
            if fields.get(name):
                raise ValueError(
                    f"{place}.{name}: adapters merge into an adapter, and '{name}' has nothing to say to that"
                )
        return []
    names = [*said.models, *([fields["base"]] if fields.get("base") else [])]
    opened = {name: headers_here(view, name) for name in dict.fromkeys(names)}
    here = {name: source for name, source in opened.items() if source is not None}
    if len(here) < len(opened):
        return []
    try:
        merge = planned(
            method,
            {name: here[name] for name in said.models},
            base=here[fields["base"]] if fields.get("base") else None,
            shard_size=bytes_of(fields["shard_size"], "shard_size"),
            **given,
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return notes(merge, bytes_of(fields["memory"], "memory"))


def headers_here(view: View, name: str) -> Source | None:
    """The model's headers, when nothing has to be downloaded, converted or made for them."""
    if name in view.outputs:
        planned = view.outputs[name]
        made = planned.done and not (planned.directory / "adapter_config.json").is_file()
        return Checkpoint.open(planned.directory) if made else None
    from fusion.job import source_model

    at: str | None = name
    while at is not None:
        if view.kinds.get(at) not in ("directory", *COMPOSED) or view.recipe.models[at].hub is not None:
            return None
        at = view.recipe.models[at].base
    return source_model(view.recipe, name, _keys.cache_directory())
