"""A recipe becomes checked steps with content keys: every word, parameter, reference, file and size.

Reads signatures, headers and configurations only; imports neither torch nor transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion import __version__, _keys, _launched, _sharded, words
from fusion._architectures import refuse_own_code
from fusion._checked import Checked
from fusion._files import config_of
from fusion._say import nearest
from fusion.recipe import Recipe, Step
from fusion.words import Word

# What a step's parameter refers to, by its name: a model, data, a store, or words of a room. All others are values.
FIELDS: dict[str, str] = {
    **dict.fromkeys(
        ("model", "teacher", "base", "reference", "target", "donor", "models", "among", "maps", "layers"), "model"
    ),
    "data": "data",
    "targets": "targets",
    "fuse": "room fuse",
    "loss": "room losses",
    "metrics": "room metrics",
    "method": "room merge",
    "post": "room post",
    "match": "room match",
    "features": "room features",
}
NESTED = ("online_merge", "merge_with")  # mappings whose own fields are understood by their names too
ARTICLES = {"model": "a model", "data": "data", "targets": "a store of targets", "metrics": "metrics"}


@dataclass(frozen=True)
class Planned:
    """A checked step: `key` names its content, `directory` is where it will lie, `done` whether it lies there."""

    step: Step
    word: Word
    fields: dict[str, Any]  # as written, fitted to the annotations, with --key value in `train`
    key: str
    directory: Path
    done: bool
    output: str  # the module's OUTPUT: model, targets or metrics
    inputs: dict[str, str]  # earlier outputs it reads -> their keys
    models: tuple[str, ...]  # the recipe's models it reads
    data: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what the step's own check says that is no error

    @property
    def name(self) -> str:
        return self.step.out

    def built(self, steps: Mapping[str, "Planned"]) -> list[str]:
        """The models that the step runs, of the recipe's and of earlier steps'; one with `BUILDS = False` runs none."""
        outputs = [name for name in self.inputs if steps[name].output == "model"]
        return [*self.models, *outputs] if self.word.constants.get("BUILDS", True) else []

    @property
    def arguments(self) -> dict[str, Any]:
        """What the step's function is called with."""
        return {"out": self.name, **self.fields} if "out" in self.word.names else dict(self.fields)


@dataclass(frozen=True)
class Plan:
    """All steps of a recipe, in order, and the directory their outputs lie in."""

    recipe: Recipe
    folder: Path
    steps: tuple[Planned, ...]

    def __getitem__(self, name: str) -> Planned:
        for planned in self.steps:
            if planned.name == name:
                return planned
        raise ValueError(f"{self.recipe.path}: no step makes '{name}'{nearest(name, [one.name for one in self.steps])}")


@dataclass(frozen=True)
class View:
    """What a step's own `check(view)` may look at while planning."""

    step: Step
    fields: Mapping[str, Any]  # with the defaults of those left out
    recipe: Recipe
    outputs: Mapping[str, Planned]  # earlier steps by the name of their output
    kinds: Mapping[str, str] = field(default_factory=dict)  # the recipe's models: hub, directory, gguf, scratch

    @property
    def place(self) -> str:
        return self.step.place

    def origin(self, name: str) -> str:
        """The recipe's model whose architecture and tokenizer the model `name` has."""
        while name in self.outputs:
            fields = self.outputs[name].fields
            name = first_model(fields)
        return name

    def config(self, name: str) -> dict[str, Any] | None:
        """config.json of a model; None while it isn't on this machine."""
        ref = self.recipe.models[self.origin(name)]
        kind = self.kinds.get(ref.name)
        if ref.base is not None:
            return self.config(ref.base)
        if kind in ("directory", "sharded"):
            return config_of(_sharded.home(_keys.model_directory(self.recipe, ref.name)))
        return ref.config


def first_model(fields: Mapping[str, Any]) -> str:
    """The model that a step's output looks like: the one it starts from, or the first of those it merges."""
    named = next((str(fields[key]) for key in ("model", "target", "base", "donor") if fields.get(key)), None)
    several = fields.get("models") or [entry["model"] for entry in fields.get("layers") or ()]
    return named if named is not None else str(next(iter(several), ""))


def plan(recipe: Recipe, out: str | Path = "runs") -> Plan:
    """The recipe's steps, checked; ValueError with one sentence a line for everything that is wrong."""
    folder = Path(out) / recipe.name
    digests = _keys.Digests()
    problems: list[str] = []
    planned: dict[str, Planned] = {}
    checked = Checked(recipe, digests)
    for step in recipe.steps:
        try:
            planned[step.out] = _step(step, recipe, planned, checked, folder)
        except ValueError as error:
            problems += str(error).split("\n")
            broken = step.out
            planned[broken] = _broken(step, folder)
    digests.save()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return Plan(recipe, folder, tuple(planned.values()))


def _broken(step: Step, folder: Path) -> Planned:
    """Stands for a step that is wrong, so that what refers to it is not called wrong as well."""
    word = Word("steps", step.verb, "", Path(), "", (), {}, ())
    return Planned(step, word, step.fields, "", folder, False, "", {}, (), ())


def _step(step: Step, recipe: Recipe, earlier: Mapping[str, Planned], checked: Checked, folder: Path) -> Planned:
    """One step, checked and keyed."""
    given = {"out": step.out, **step.fields} if step.named else dict(step.fields)
    word = _find(step)
    if "train" in word.names and recipe.overrides:
        train = given.get("train") or {}
        given["train"] = {**train, **recipe.overrides} if isinstance(train, dict) else train
    fitted = words.check("steps", step.verb, given, step.place)
    fitted.pop("out", None)
    inputs: dict[str, str] = {}
    models: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    plugins = [word] if "." in step.verb else []
    files = checked.files(fitted.get("path"))
    if "files" in word.functions:
        files += [one for path in words.module(word).files(fitted) for one in checked.files(path)]
    for name, value, place in _named(fitted, step.place):
        kind = FIELDS.get(name, "")
        if kind.startswith("room "):
            if (
                name == "method" and value is not None
            ):  # its parameters stand beside it and may vary: see the step's check
                found = _method(value, place)
                plugins += [found] if "." in value else []
                continue
            for entry in value if isinstance(value, list) else [value]:
                if entry is None:
                    continue
                chosen, params = words.parse(kind.removeprefix("room "), entry, place)
                files += checked.files(params.get("path"))
                plugins += [words.find(kind.removeprefix("room "), chosen)] if "." in chosen else []
        elif kind:
            for reference in _references(value, kind, place):
                _refer(reference, kind, place, step, recipe, earlier)
                if reference in earlier:
                    inputs[reference] = earlier[reference].key
                elif kind == "data":
                    texts[reference] = checked.text(reference)
                else:
                    models[reference] = checked.model(reference)
    parts = {
        "verb": step.verb,
        "fields": fitted,
        "inputs": inputs,
        "models": models,
        "data": texts,
        "files": files,
        "plugins": [checked.digests(plugin.file) for plugin in plugins],
        "seed": recipe.seed,
        "version": __version__,
    }
    key = _keys.of(parts)
    directory = folder / f"{step.out}-{key[:8]}"
    output = str(word.constants.get("OUTPUT", "metrics"))
    done = (directory / "done.json").is_file()
    if isinstance(fitted.get("train"), dict):
        _launched.check_train(fitted["train"], _launched.Launched(), f"{step.place}.train")
    defaults = {parameter.name: parameter.default for parameter in word.parameters if not parameter.required}
    view = View(step, {**defaults, **fitted}, recipe, earlier, checked.kinds)
    planned = Planned(step, word, fitted, key, directory, done, output, inputs, tuple(models), tuple(texts))
    if all(inputs.values()):
        for name in planned.built(earlier):
            if view.origin(name) in recipe.models and (config := view.config(name)) is not None:
                refuse_own_code(step.place, name, config)
        if "check" in word.functions:
            return replace(planned, notes=tuple(words.module(word).check(view) or ()))
    return planned


def _named(fields: Mapping[str, Any], place: str) -> list[tuple[str, Any, str]]:
    """Fields with where they stand, and those inside of the mappings in NESTED."""
    found = [(name, value, f"{place}.{name}") for name, value in fields.items()]
    for outer in NESTED:
        inside = fields.get(outer)
        found += [(n, v, f"{place}.{outer}.{n}") for n, v in inside.items()] if isinstance(inside, dict) else []
    return found


def _find(step: Step) -> Word:
    try:
        return words.find("steps", step.verb)
    except ValueError as error:
        raise ValueError(f"{step.place}: {error}") from None


def _method(value: Any, place: str) -> Word:
    try:
        return words.find("merge", str(value))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _references(value: Any, kind: str, place: str) -> list[str]:
    """The names in `a`, `[a, b]`, a model's `{a: 1.0, b: 0.5}` (weights), data's `{prose: a, code: b}` (domains), or
    layers' `[{model: a, take: [0, 8]}]`."""
    if isinstance(value, dict):
        entries = list(value.values() if kind == "data" else value)
    else:
        given = [value] if isinstance(value, str) else list(value or ())
        entries = [one["model"] if isinstance(one, dict) and "model" in one else one for one in given]
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"{place}: a name is needed here, not {entry!r:.60}")
    return entries


def _refer(name: str, kind: str, place: str, step: Step, recipe: Recipe, earlier: Mapping[str, Planned]) -> None:
    """ValueError unless `name` is something of that kind and stands before this step."""
    outputs = [one for one, planned in earlier.items() if planned.output in (kind, "")]
    allowed = outputs + (list(recipe.models) if kind == "model" else list(recipe.data) if kind == "data" else [])
    if name in allowed:
        return
    if name in earlier:
        what = ARTICLES.get(earlier[name].output, earlier[name].output)
        raise ValueError(f"{place}: '{name}' is {what}; {ARTICLES[kind]} is needed here")
    if name == step.out or name in (later.out for later in recipe.steps):
        raise ValueError(f"{place}: '{name}' is only made {'by this step' if name == step.out else 'later'}")
    if name in recipe.models or name in recipe.data:
        what = "a model" if name in recipe.models else "data"
        raise ValueError(f"{place}: '{name}' is {what}; {ARTICLES[kind]} is needed here")
    raise ValueError(f"{place}: there is no {'model' if kind == 'model' else kind} '{name}'{nearest(name, allowed)}")
