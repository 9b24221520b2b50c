"""A merge, checked from headers alone: models, method, parameters, tensors; and what identifies it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion import __version__, words
from fusion._carry import left_behind
from fusion._deal import too_large
from fusion._files import file_digest
from fusion._method import Method, weighed
from fusion._misfit import computing_otherwise, shown
from fusion._names import renamed
from fusion._params import depths, layer_of
from fusion._regions import Recipe
from fusion._say import nearest
from fusion._tasks import Inputs, Task, tasks
from fusion._trial import trial
from fusion.checkpoint import Checkpoint, Source, open_source
from fusion.engine import _method, _post, _weights


@dataclass(frozen=True)
class Planned:
    """All that decides what is written."""

    inputs: Inputs
    recipe: Recipe | None  # None: copies only
    tasks: tuple[Task, ...]
    config: dict[str, Any]
    sidecars: Mapping[str, Source]
    speaker: Source  # whose tokenizer and templates are carried
    shard_size: int
    given: Mapping[str, Any]  # method, params ... as they were given

    @functools.cached_property
    def depths(self) -> dict[str, int]:
        return depths(task.name for task in self.tasks)

    @property
    def scope(self) -> str:
        return self.recipe.method.scope(self.recipe.params) if self.recipe else "tensor"

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """What merge.json says: what was done, with which version, to which files."""
        models = {name or "base": source for name, source in self.inputs.everyone.items()}
        sidecars = {name or "base": source for name, source in self.sidecars.items()}
        return json.loads(
            json.dumps(
                {
                    "fusion": __version__,
                    **self.given,
                    "inputs": {
                        name: {"path": str(one.path.absolute()), "files": _files(one)} for name, one in models.items()
                    },
                    "statistics": {
                        name: {"path": str(one.path.absolute()), "files": _files(one)} for name, one in sidecars.items()
                    },
                }
            )
        )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a partial directory has to have been begun with; inputs by their size, time and headers."""
        found = [self.recipe.method.word, *(word.word for word, _ in self.recipe.post)] if self.recipe else []
        rooms = ["merge", *["post"] * len(found[1:])]
        sources = [file_digest(words.find(room, word).file) for room, word in zip(rooms, found)]
        config = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return {**self.provenance, "config": config, "shard_size": self.shard_size, "methods": sources}


def notes(plan: Planned, memory: int) -> list[str]:
    """What is no error and should be known before the merge."""
    found = too_large(plan.recipe, plan.tasks, memory) + computing_otherwise(plan.inputs)
    if plan.given["tokenizer"] is None:
        found += left_behind(plan.inputs.models, *plan.inputs.target)
    return found


def _files(source: Source) -> list[list[Any]]:
    """[name, bytes, time of the last change, digest of the header] of each file."""
    out = []
    for file in source.files:
        status = file.stat()
        out.append([file.name, status.st_size, status.st_mtime_ns, _header_digest(file)])
    return out


def _header_digest(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return hashlib.blake2b(stream.read(length), digest_size=16).hexdigest()


def planned(
    method: str | None,
    models: Mapping[str, Source | Path | str],
    *,
    base: Source | Path | str | None = None,
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    post: Sequence[str | Mapping[str, Any]] | None = None,
    only: Sequence[str] | None = None,
    copy: Sequence[str] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    names: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Path | str] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    shard_size: int = 5 * 10**9,
    tokenizer: str | None = None,
) -> Planned:
    """Reads headers and configurations; ValueError with a sentence for whatever does not go together."""
    if not models:
        raise ValueError("there is no model to merge; give at least one")
    if (method is None) == (layers is None):
        raise ValueError(
            "a merge has either a method, which merges, or layers, which takes whole ones; for both make two steps"
        )
    ground = None if base is None else _opened(base, None)
    opened = {name: _opened(one, ground) for name, one in models.items()}
    for what, table in (("names", names), ("statistics", statistics)):
        allowed = [*opened, *(["base"] if ground is not None and what == "statistics" else [])]
        for name in table or {}:
            if name not in allowed:
                raise ValueError(f"{what}: no model is called '{name}'{nearest(name, allowed)}")
    target = ground if ground is not None else next(iter(opened.values()))
    opened = {
        name: renamed(name, one, names[name], target) if names and name in names else one
        for name, one in opened.items()
    }
    inputs = Inputs(opened, ground)
    recipe = None
    if method is not None:
        found = _method(method)
        fitted = found.check(params or {}, len(opened), base=ground is not None, weights=weighed(weights))
        after = tuple(_post(one, ground is not None) for one in post or ())
        recipe = Recipe(found, fitted, _weights(found, weights, len(opened)), after, seed)
    every, config = tasks(inputs, only=only, copy=copy, layers=layers, dtype=dtype)
    sidecars = {"" if name == "base" else name: Checkpoint.open(file) for name, file in (statistics or {}).items()}
    given = {
        "method": method,
        "params": params or {},
        "weights": weights if weights is None else list(weights),
        "post": list(post or ()),
        "only": only,
        "copy": copy,
        "layers": layers,
        "names": names,
        "dtype": dtype,
        "seed": seed,
        "tokenizer": tokenizer,
    }
    plan = Planned(inputs, recipe, tuple(every), config, sidecars, _speaker(inputs, tokenizer), shard_size, given)
    if recipe is not None:
        _informed(plan, recipe.method)
        _informed_after(plan, [word for word, _ in after])
        _resolvable(plan, recipe)
    return plan


def _informed(plan: Planned, method: Method) -> None:
    """Every statistic that the method can't do without is there for some tensor, and those that it reads entry by entry
    are there for all models or none, in the tensor's shape."""
    sidecars = {model: source for model, source in plan.sidecars.items() if model}
    held = {name.partition("/")[0] for source in sidecars.values() for name in source.entries}
    for statistic in method.inputs:
        if statistic not in held and statistic not in method.optional:
            raise ValueError(
                f"{method.word} reads the statistic '{statistic}' of each model, and no file given under statistics "
                f"holds tensors called {statistic}/..."
            )
    for task in plan.tasks:
        for statistic, kind in method.inputs.items() if task.action == "merge" else ():
            if kind == "element":
                _of_all(plan, method, task, statistic)


def _informed_after(plan: Planned, after: Sequence[Method]) -> None:
    """The statistics of the base that words under `post` read are there for some tensor."""
    source = plan.sidecars.get("")
    held = set() if source is None else {name.partition("/")[0] for name in source.entries}
    for word in after:
        for statistic in word.inputs.keys() - held:
            raise ValueError(
                f"post: {word.word} reads the statistic '{statistic}' of the base, and no file given for it under "
                f"statistics (base: FILE) holds tensors called {statistic}/..."
            )


def _of_all(plan: Planned, method: Method, task: Task, statistic: str) -> None:
    found = {}
    for model, own in zip(plan.inputs.models, task.sources, strict=True):
        sidecar = plan.sidecars.get(model)
        found[model] = None if sidecar is None else sidecar.entries.get(f"{statistic}/{own}")
    lacking = [model for model, entry in found.items() if entry is None]
    if lacking and len(lacking) < len(found):
        raise ValueError(f"{method.word} needs {statistic}/... of {task.name} of every model; '{lacking[0]}' has none")
    for model, entry in found.items():
        if entry is not None and entry.shape != task.shape:
            raise ValueError(
                f"{entry.name} among the statistics of '{model}' is {shown(entry)}, the tensor it is about "
                f"{shown(task.entry)}"
            )


def _opened(one: Source | Path | str, base: Source | None) -> Source:
    return open_source(one, base) if isinstance(one, Path | str) else one


def _speaker(inputs: Inputs, tokenizer: str | None) -> Source:
    if tokenizer is None or (tokenizer == "base" and inputs.base is not None):
        return inputs.target[1]
    if tokenizer not in inputs.models:
        allowed = [*inputs.models, *(["base"] if inputs.base is not None else [])]
        raise ValueError(f"tokenizer: no model is called '{tokenizer}'{nearest(tokenizer, allowed)}")
    return inputs.models[tokenizer]


def _resolvable(plan: Planned, recipe: Recipe) -> None:
    """Every parameter has a value for every tensor that the method takes, before the first one is read."""
    tried = set()
    for task in plan.tasks:
        if task.action == "merge":
            layer = layer_of(task.name, plan.depths)
            params = recipe.method.resolve(recipe.params, task.name, layer)
            after = [(word, word.resolve(given, task.name, layer)) for word, given in recipe.post]
            if repr((params, after)) not in tried:
                tried.add(repr((params, after)))
                trial(recipe.method, params, recipe.weights, plan.inputs.base is not None, after)
