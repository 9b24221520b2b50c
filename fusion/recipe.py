"""A recipe: frozen dataclasses and the strict loader of the YAML they come from.

Strict means: an unknown or repeated key, a wrong type or a name used twice is a ValueError that says where.
Everything a recipe's words mean (parameters, references) is checked in `fusion.plan`, which can read signatures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fusion._say import nearest

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*(\.[A-Za-z0-9_+-]+)*")


@dataclass(frozen=True)
class ModelRef:
    """Where a model comes from: exactly one of `hub`, `path`, `config`."""

    name: str
    hub: str | None = None
    revision: str | None = None
    path: str | list[str] | None = None  # directory or .gguf (package:NAME/FILE: in a package; a list: its parts)
    sha256: str | None = None  # of a .gguf file
    base: str | None = None  # name of the model that a PEFT adapter sits on
    config: dict[str, Any] | None = None  # a model from scratch, with `tokenizer`
    tokenizer: dict[str, Any] | None = None
    place: str = ""


@dataclass(frozen=True)
class DataRef:
    """Where text comes from: exactly one of `path`, `hub`, `mix`."""

    name: str
    path: str | None = None  # file, directory or glob relative to the recipe; "stdlib:" is Python's own sources
    hub: str | None = None
    revision: str | None = None
    format: str | None = None  # json, parquet, text; by the file's ending when left out
    split: str = "train"
    column: str = "text"
    shuffle: int | None = None  # a seed: documents in a hashed order before the split; None: as they stand
    max_bytes: int | None = None  # longer texts are cut at paragraph, line or space; None: 2048 for text, else uncut
    mix: dict[str, float] | None = None  # name -> weight
    place: str = ""


@dataclass(frozen=True)
class Step:
    """One entry of `steps`: a verb, the name of what it makes, and its fields as written (without `out`)."""

    verb: str
    out: str
    fields: dict[str, Any]
    place: str
    named: bool = True  # False: `out` was left out and is the verb with its position


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, and what `--key value` added to its train blocks."""

    path: Path
    name: str
    seed: int
    models: dict[str, ModelRef]
    data: dict[str, DataRef]
    steps: tuple[Step, ...]
    result: str | None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The directory that the recipe's paths are relative to."""
        return self.path.resolve().parent


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and reads 1e-5 as the number it is in YAML 1.2."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor, whose keys the ones written here override
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string; put it in quotes")
        if key in seen:
            raise ValueError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def scalar(text: str) -> Any:
    """The value that `text` has in a recipe: 1e-5 a float, true a bool, [a, b] a list."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"'{text}' is not YAML: {' '.join(str(error).split())}") from None


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a file, or of a packaged recipe's name; ValueError with the place where it is wrong."""
    found = locate("recipes", str(path))
    try:
        text = found.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {' '.join(str(error).split())}") from None
    place = str(path) if found == Path(path) else str(found)
    top = _table(tree, place, ("seed", "models", "data", "steps", "result"))
    models = {
        name: _model(name, entry, f"{place}: models.{name}")
        for name, entry in _table(top.get("models") or {}, f"{place}: models").items()
    }
    data = {
        name: _data(name, entry, f"{place}: data.{name}")
        for name, entry in _table(top.get("data") or {}, f"{place}: data").items()
    }
    steps = _steps(top.get("steps"), f"{place}: steps")
    _namespace(models, data, steps, place)
    _mixes(data)
    seed = _typed(top.get("seed", 0), int, f"{place}: seed")
    result = top.get("result")
    if result is not None and result not in (outs := [step.out for step in steps]):
        raise ValueError(f"{place}: result: no step makes '{result}'{nearest(result, outs)}")
    return Recipe(found, found.stem, seed, models, data, steps, result, dict(overrides or {}))


def locate(kind: str, name: str) -> Path:
    """The file `name`, else the packaged one in `kind` (recipes or launch), with or without .yaml."""
    if Path(name).is_file():
        return Path(name)
    names: set[str] = set()
    package = Path(__file__).resolve().parent
    for folder in (package.parent / kind, package / "_data" / kind):  # a checkout, an installed wheel
        if not (package.parent / "pyproject.toml").is_file() and folder.parent == package.parent:
            continue
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file() and folder in candidate.resolve().parents:
                return candidate
        names |= {str(found.relative_to(folder).with_suffix("")) for found in folder.rglob("*.yaml")}
    raise ValueError(f"{name}: no such file, and no packaged one of that name in {kind}/{nearest(name, names)}")


def _table(value: object, place: str, allowed: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a mapping is needed here, not {_shown(value)}")
    for key in value:
        if allowed is not None and key not in allowed:
            raise ValueError(f"{place}: unknown key '{key}'{nearest(key, allowed)}")
    return value


def _model(name: str, entry: object, place: str) -> ModelRef:
    keys = tuple(item.name for item in fields(ModelRef) if item.name not in ("name", "place"))
    table = _table(entry, place, keys)
    _exactly_one(table, ("hub", "path", "config"), place)
    for key in ("hub", "revision", "sha256", "base"):
        _typed(table.get(key, ""), str, f"{place}.{key}")
    paths = table.get("path", "")
    for path in paths if isinstance(paths, list) and paths else [paths]:
        _typed(path, str, f"{place}.path")
    for key in ("config", "tokenizer"):
        _typed(table.get(key, {}), dict, f"{place}.{key}")
    if "revision" in table and "hub" not in table:
        raise ValueError(f"{place}: 'revision' goes with 'hub'; a path has none")
    if ("config" in table) != ("tokenizer" in table):
        raise ValueError(f"{place}: a model from scratch needs both 'config' and 'tokenizer'")
    return ModelRef(name=name, place=place, **table)


def _data(name: str, entry: object, place: str) -> DataRef:
    keys = tuple(item.name for item in fields(DataRef) if item.name not in ("name", "place"))
    table = dict(_table(entry, place, keys))
    _exactly_one(table, ("path", "hub", "mix"), place)
    for key in ("path", "hub", "revision", "format", "split", "column"):
        _typed(table.get(key, ""), str, f"{place}.{key}")
    if table.get("format") not in (None, "json", "parquet", "text"):
        formats = ("json", "parquet", "text")
        raise ValueError(f"{place}.format: unknown format '{table['format']}'{nearest(table['format'], formats)}")
    _typed(table.get("shuffle", 0), int, f"{place}.shuffle")
    if _typed(table.get("max_bytes", 1), int, f"{place}.max_bytes") < 1:
        raise ValueError(f"{place}.max_bytes: {table['max_bytes']} is not a positive number of bytes")
    if "mix" in table:
        if extra := [key for key in table if key != "mix"]:
            raise ValueError(f"{place}: a mix has no '{extra[0]}'; give it to the data that are mixed")
        mix = _table(table["mix"], f"{place}.mix")
        for part, weight in mix.items():
            if _typed(weight, float, f"{place}.mix.{part}") <= 0:
                raise ValueError(f"{place}.mix.{part}: the weight {weight} is not positive")
        table["mix"] = {part: float(weight) for part, weight in mix.items()}
    if "path" in table and "format" not in table:
        ending = table["path"].rpartition(".")[2].removesuffix("l")
        table["format"] = {"json": "json", "parquet": "parquet"}.get(ending, "text")
    return DataRef(name=name, place=place, **table)


def _steps(entries: object, place: str) -> tuple[Step, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place}: a list of steps is needed here, not {_shown(entries)}")
    steps = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(
                f"{place}[{index}]: a step is one verb with its fields, like `- merge: {{out: soup, ...}}`"
            )
        ((verb, given),) = entry.items()
        where = f"{place}[{index}].{verb}"
        table = dict(_table({} if given is None else given, where))
        named = "out" in table
        out = _typed(table.pop("out", f"{verb.rpartition('.')[2]}_{index}"), str, f"{where}.out")
        steps.append(Step(verb, out, table, where, named))
    return tuple(steps)


def _namespace(models: dict[str, ModelRef], data: dict[str, DataRef], steps: tuple[Step, ...], place: str) -> None:
    """Models, data and outputs share one namespace of names, which are also names of directories."""
    taken: dict[str, str] = {}
    entries = [(name, f"models.{name}") for name in models] + [(name, f"data.{name}") for name in data]
    entries += [(step.out, step.place.removeprefix(f"{place}: ") + ".out") for step in steps]
    for name, where in entries:
        if not NAME.fullmatch(name):
            raise ValueError(f"{place}: {where}: '{name}' can't be a name; use letters, digits, _ and -")
        if name in taken:
            raise ValueError(f"{place}: {where}: the name '{name}' is taken by {taken[name]}")
        taken[name] = where
    if any(step.out == "result" for step in steps):
        raise ValueError(f"{place}: an output can't be called 'result': that is the link to the recipe's result")


def _mixes(data: dict[str, DataRef]) -> None:
    earlier: list[str] = []
    for ref in data.values():
        for part in ref.mix or {}:
            if part not in earlier:
                later = " (a mix comes after its parts)" if part in data else ""
                raise ValueError(f"{ref.place}.mix: no data '{part}'{later}{'' if later else nearest(part, earlier)}")
        earlier.append(ref.name)


def _exactly_one(table: dict[str, Any], keys: tuple[str, ...], place: str) -> None:
    given = [key for key in keys if key in table]
    if len(given) != 1:
        raise ValueError(f"{place}: exactly one of {', '.join(keys)} is needed, not {' and '.join(given) or 'none'}")


def _typed(value: Any, kind: type, place: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return value
    hint = "; put it in quotes" if kind is str and isinstance(value, (int, float)) else ""
    words = {int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
    raise ValueError(f"{place}: {words[kind]} is needed here, not {_shown(value)}{hint}")


def _shown(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.60}"
