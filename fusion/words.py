"""word -> file -> function -> parameters, read from the source without importing it.

A recipe word is a file name is a function name: `method: ties` is `ties()` in `fusion/merge/ties.py`. A word with a dot
(`my_lab.ties2`) is the module `my_lab.ties2` with a function `ties2`. Keyword-only arguments are the parameters.
"""

import ast
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from fusion._say import nearest
from fusion._types import fit

ROOMS = {
    **dict.fromkeys(("steps", "merge", "post", "losses", "fuse", "metrics"), "fusion"),
    **dict.fromkeys(("match", "features", "families"), "alignment"),
}
# What the caller of a room's functions hands over by name; not a recipe's to give.
SUPPLIED: dict[str, frozenset[str]] = {
    "merge": frozenset({"stats", "inputs", "draw", "name", "shape", "layer"}),
    "metrics": frozenset({"documents", "base", "progress", "open_model"}),
    "post": frozenset({"stats", "inputs", "draw", "name", "shape", "layer"}),
    "match": frozenset({"target", "donor"}),
}


@dataclass(frozen=True)
class Parameter:
    """A keyword-only argument: `default` is its literal value (or source text), `annotation` its source text."""

    name: str
    default: Any
    required: bool
    annotation: str


@dataclass(frozen=True)
class Word:
    """What the source of a word says about it."""

    room: str
    word: str
    module: str
    file: Path
    summary: str  # the docstring's first line
    parameters: tuple[Parameter, ...]
    constants: dict[str, Any]  # the module's literal constants
    functions: tuple[str, ...]  # names of the module's public functions

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)


def find(room: str, word: str) -> Word:
    """The word in a room; ValueError with the nearest guess when there is none."""
    if room not in ROOMS:
        raise ValueError(f"unknown room '{room}'{nearest(room, ROOMS)}")
    if "." in word:
        file = _dotted(word)
        if file is None:
            raise ValueError(f"no module '{word}' can be found from here; a word with a dot is a Python module")
        return _read(room, word, word, file, file.stat().st_mtime_ns)
    folder = _folder(room)
    file = folder / f"{word}.py"
    if word.startswith("_") or not word.isidentifier() or not file.is_file():
        raise ValueError(f"unknown {_singular(room)} '{word}'{nearest(word, _names(folder))}")
    return _read(room, word, f"{ROOMS[room]}.{room}.{word}", file, file.stat().st_mtime_ns)


def list_room(room: str) -> tuple[Word, ...]:
    """All words of a room, by name; a room whose folder does not exist yet has none."""
    if room not in ROOMS:
        raise ValueError(f"unknown room '{room}'{nearest(room, ROOMS)}")
    return tuple(find(room, name) for name in _names(_folder(room)))


def load(room: str, word: str) -> Callable[..., Any]:
    """The word's function; this imports its module."""
    found = find(room, word)
    module = importlib.import_module(found.module)
    function: Callable[..., Any] = vars(module)[found.word.rpartition(".")[2]]
    return function


def module(found: Word) -> Any:
    """The word's module, imported."""
    return importlib.import_module(found.module)


def parse(room: str, value: Any, place: str) -> tuple[str, dict[str, Any]]:
    """(word, parameters) of `fuse: min_ce` or `fuse: {min_ce: {unit: token}}`, checked against the signature."""
    if isinstance(value, str):
        return value, check(room, value, {}, place)
    if isinstance(value, Mapping) and len(value) == 1:
        ((word, params),) = value.items()
        if params is None:
            params = {}
        if not isinstance(params, Mapping):
            raise ValueError(f"{place}.{word}: parameters are a mapping, not {params!r:.60}")
        return word, check(room, word, params, f"{place}.{word}" if params else place)
    raise ValueError(f"{place}: a word or {{word: {{parameter: value}}}} is needed here, not {value!r:.60}")


def check(room: str, word: str, params: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The parameters, fitted to their annotations; ValueError for an unknown, missing or ill-typed one."""
    try:
        found = find(room, word)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    known = {parameter.name: parameter for parameter in found.parameters}
    fitted: dict[str, Any] = {}
    for name, value in params.items():
        if name not in known:
            raise ValueError(f"{place}: {word} has no parameter '{name}'{nearest(name, known)}")
        fitted[name], allowed = fit(value, known[name].annotation)
        if allowed:
            raise ValueError(f"{place}.{name}: {allowed} is needed here, not {type(value).__name__} {value!r:.60}")
    for parameter in found.parameters:
        if parameter.required and parameter.name not in params:
            raise ValueError(f"{place}: {word} needs '{parameter.name}'")
    return fitted


def _singular(room: str) -> str:
    return {"steps": "step", "merge": "merge method", "post": "post word", "losses": "loss", "fuse": "fusion rule"}.get(
        room, {"metrics": "metric", "features": "feature", "families": "family"}.get(room, f"{room} word")
    )


def _folder(room: str) -> Path:
    """The room's folder, found without importing its package."""
    if ROOMS[room] == "fusion":
        return Path(__file__).parent / room
    spec = PathFinder.find_spec(ROOMS[room]) or PathFinder.find_spec(ROOMS[room], [str(Path(__file__).parents[1])])
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package '{ROOMS[room]}' is not installed, and the room '{room}' is in it")
    return Path(next(iter(spec.submodule_search_locations))) / room


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


def _dotted(word: str) -> Path | None:
    """The file of a dotted module; parents are walked by hand, since importlib's own find_spec imports them."""
    places: list[str] | None = None
    parts = word.split(".")
    for depth in range(1, len(parts) + 1):
        # by the last part alone: a folder without __init__.py would look for its parent among the imported modules
        spec = PathFinder.find_spec(parts[depth - 1], places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
        if depth == len(parts):
            return Path(spec.origin) if spec.origin else None
    return None


@functools.cache
def _read(room: str, word: str, module: str, file: Path, _changed: int) -> Word:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    name = word.rpartition(".")[2]
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise ValueError(f"{file}: a word is a function of its file's name, and there is no function '{name}' in it")
    function = functions[name]
    arguments = function.args
    supplied = SUPPLIED.get(room, frozenset())
    parameters = tuple(
        Parameter(
            argument.arg,
            _literal(default) if default is not None else None,
            default is None,
            ast.unparse(argument.annotation) if argument.annotation is not None else "",
        )
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if argument.arg not in supplied
    )
    summary = (ast.get_docstring(function) or ast.get_docstring(tree) or "").strip().partition("\n")[0]
    public = tuple(one for one in functions if not one.startswith("_"))
    return Word(room, word, module, file, summary, parameters, _constants(tree), public)


def _constants(tree: ast.Module) -> dict[str, Any]:
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(target, ast.Name) and _is_literal(value):
            constants[target.id] = ast.literal_eval(value)
    return constants


def _is_literal(node: ast.expr) -> bool:
    simple = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.UnaryOp, ast.USub, ast.UAdd, ast.Load)
    return all(isinstance(part, simple) for part in ast.walk(node)) and not (
        any(isinstance(part, ast.UnaryOp) and not isinstance(part.operand, ast.Constant) for part in ast.walk(node))
    )


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(node) if _is_literal(node) else ast.unparse(node)
