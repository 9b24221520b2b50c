"""Tables on the terminal: a plan, the words of a room, what is in a directory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusion import _estimate, words
from fusion._files import header
from fusion._say import duration, size
from fusion.plan import Plan
from fusion.words import Word

READ = ("inputs", "statistics")  # what merge.json says was read
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def show_plan(plan: Plan) -> None:
    """One row a step, then what is needed altogether."""
    console = _console()
    table = Table(title=f"{plan.recipe.path}: seed {plan.recipe.seed}, in {plan.folder}", title_justify="left")
    for column in ("step", "output", "cached", "key", "reads", "disk", "RAM", "time"):
        table.add_column(column, overflow="fold", justify="right" if column in ("disk", "RAM", "time") else "left")
    needs = _estimate.estimate(plan)
    for planned, need in zip(plan.steps, needs, strict=True):
        reads = ", ".join([*planned.models, *planned.inputs, *planned.data])
        figures = (_about(need.disk, size), _about(need.memory, size), _about(need.seconds, duration))
        shown = ("", "", "") if planned.done else figures
        table.add_row(planned.step.verb, planned.name, "yes" if planned.done else "", planned.key[:8], reads, *shown)
    console.print(table)
    for planned in plan.steps:
        for note in () if planned.done else planned.notes:
            console.print(f"{planned.name}: {note}", markup=False)
    left = [need for planned, need in zip(plan.steps, needs, strict=True) if not planned.done]
    if not left:
        console.print("Everything is done; fusion run only writes the report again.")
        return
    disk = sum(need.disk or 0 for need in left) + max(need.meanwhile for need in left)
    seconds = sum(need.seconds or 0 for need in left)
    where = _estimate.machine()
    console.print(f"Estimates, to be off by a factor of 2 or 3: {size(disk)} of disk, {duration(seconds)} on {where}.")


def show_words(room: str | None) -> None:
    """One line a word: its parameters with defaults, and what it does."""
    console = _console()
    for one in [room] if room is not None else list(words.ROOMS):
        found = words.list_room(one)
        if not found and room is None:
            continue
        table = Table(title=f"{one} ({words.ROOMS[one]}/{one}/)", title_justify="left", show_edge=False)
        table.add_column("word", no_wrap=True)
        table.add_column("parameters", overflow="fold", ratio=1)
        table.add_column("what comes out", overflow="fold", ratio=1)
        for word in found:
            table.add_row(word.word, _parameters(word), word.summary)
        console.print(table)
        console.print()


def show_directory(directory: Path) -> None:
    """A checkpoint from its headers, or a store from its own."""
    console = _console()
    store = directory / "store.json"
    if store.is_file():
        about = json.loads(store.read_text(encoding="utf-8"))
        table = Table(title=f"{directory}: a store of targets", title_justify="left", show_header=False)
        for name, value in about.items():
            table.add_row(name, f"{len(value)} entries" if isinstance(value, list) else _short(value))
        console.print(table)
    elif (directory / "config.json").is_file() or (directory / "merge.json").is_file():
        _show_checkpoint(console, directory)
    elif not (directory / "step.json").is_file():
        raise ValueError(f"{directory} holds neither config.json (a checkpoint) nor store.json (a store of targets)")
    _show_provenance(console, directory)


def _show_checkpoint(console: Console, directory: Path) -> None:
    found = header(directory)
    table = Table(title=f"{directory}: {found.config.get('model_type', 'a checkpoint')}", title_justify="left")
    for column in ("tensor", "shape", "dtype", "file"):
        table.add_column(column, overflow="fold")
    for name, tensor in found.tensors.items():
        table.add_row(name, " x ".join(map(str, tensor.shape)), tensor.dtype, tensor.file)
    console.print(table)
    dtypes = Counter(tensor.dtype for tensor in found.tensors.values())
    shown = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    ties = "input and output embedding are one tensor" if found.tied else "no ties"
    console.print(f"{found.parameters:,} parameters, {size(found.bytes)}; tensors: {shown}; {ties}")
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        console.print("tokenizer: none")
        return
    about = json.loads(tokenizer.read_text(encoding="utf-8"))
    settings_file = directory / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    roles = {role: settings[role] for role in ROLES if settings.get(role)}
    texts = {role: value["content"] if isinstance(value, dict) else value for role, value in roles.items()}
    named = ", ".join(f"{role.removesuffix('_token')} {text}" for role, text in texts.items())
    kind, entries = about["model"].get("type", "unknown"), len(about["model"].get("vocab", ()))
    console.print(f"tokenizer: {kind}, {entries:,} entries; {named}", markup=False)


def _show_provenance(console: Console, directory: Path) -> None:
    for name in ("step.json", "source.json", "merge.json"):
        if not (directory / name).is_file():
            continue
        about = json.loads((directory / name).read_text(encoding="utf-8"))
        if name == "merge.json":
            read = {f"{what} {one}": entry["path"] for what in READ for one, entry in about.pop(what).items()}
            checked = f"{len(about.pop('tensors'))} tensors with a checksum each"
            about = {
                **{key: value for key, value in about.items() if value not in (None, [], {})},
                **read,
                "written": checked,
            }
        table = Table(title=f"provenance ({name})", title_justify="left", show_header=False)
        for key, value in about.items():
            table.add_row(key, _short(value))
        console.print(table)


def _parameters(word: Word) -> str:
    parts = []
    for parameter in word.parameters:
        if parameter.name == "out":
            continue
        parts.append(parameter.name if parameter.required else f"{parameter.name}={parameter.default!r}")
    return ", ".join(parts).replace("[", r"\[")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return (text if len(text) <= 400 else text[:400] + " ...").replace("[", r"\[")


def _about(value: float | None, say: Any) -> str:
    return "?" if value is None else f"~{say(value)}"


def _console() -> Console:
    """As wide as the terminal; 120 columns where the output is not one, so that names are not folded in a log."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
