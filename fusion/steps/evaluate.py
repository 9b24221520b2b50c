"""Models measured by metrics, per domain: one table that says which is better at what."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "metrics"


@dataclass(frozen=True)
class Item:
    """One measurement: a model under a metric, on a domain when the metric reads documents (else "")."""

    model: str
    word: str
    params: dict[str, Any]
    domain: str
    data: str

    @property
    def file(self) -> str:
        """The name of its result; what is measured decides it, not the place in the recipe."""
        text = json.dumps([self.model, self.word, self.params, self.domain, self.data], sort_keys=True)
        return f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"


def evaluate(
    job: Job,
    *,
    models: str | list[str],
    metrics: str | list[str | dict[str, Any]],
    data: str | list[str] | dict[str, str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    out: str | None = None,
) -> None:
    """metrics.json: {"models": {model: {metric: result, or {domain: result} for metrics that read documents}}}.

    data: a name, names, or domain: name; each is a domain of its own.  Ranks share the measurements; each is written as
    soon as it is there, so that a killed run measures only what is missing.
    """
    items = plan_items(models, metrics, data, job.place)
    folder = job.directory / "items"
    folder.mkdir(parents=True, exist_ok=True)
    loaded: tuple[str, Any, Any] = ("", None, None)
    for item in items[job.rank :: job.world]:
        target = folder / item.file
        if target.exists():
            continue
        if loaded[0] != item.model:
            loaded = ("", None, None)  # lets go of the last model before the next one is read
            loaded = (item.model, *_load(job.model(item.model), dtype, job.device))
        result = measure(job, item, loaded[1], loaded[2])
        temporary = target.with_name(f"{target.name}.{job.rank}.tmp")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        os.replace(temporary, target)
    if job.rank == 0:
        job.wait(lambda: all((folder / item.file).exists() for item in items), "the other ranks' measurements")
        merged = merge(items, folder)
        job.measured({"models": merged})
        show(merged)


def _load(directory: Path, dtype: str, device: str) -> tuple[Any, Any]:
    from fusion import sources

    return sources.load_model(directory, dtype, device=device), sources.load_tokenizer(directory)


def plan_items(models: Any, metrics: Any, data: Any, place: str) -> list[Item]:
    """All measurements, by model; ValueError for a metric without the data it needs and for anything asked twice."""
    from fusion import words

    domains = domains_of(data)
    names = [models] if isinstance(models, str) else list(models)
    entries = metrics if isinstance(metrics, list) else [metrics]
    parsed = [words.parse("metrics", entry, f"{place}.metrics[{index}]") for index, entry in enumerate(entries)]
    _refuse_twice_and_strangers(names, parsed, place)
    items = []
    for name in names:
        for word, params in parsed:
            reads = "documents" in inspect.signature(words.load("metrics", word)).parameters
            if reads and not domains:
                raise ValueError(f"{place}: {word} reads text and needs data: a name of the recipe's data, or several")
            targets = domains.items() if reads else [("", "")]
            items += [Item(name, word, params, domain, source) for domain, source in targets]
    return items


def _refuse_twice_and_strangers(names: list[str], parsed: list[tuple[str, dict[str, Any]]], place: str) -> None:
    """ValueError for what is given twice, and for a metric's `target` that is none of the models: only on these does
    the step depend."""
    for what, given in (("model", names), ("metric", [word for word, _ in parsed])):
        twice = [name for number, name in enumerate(given) if name in given[:number]]
        if twice:
            raise ValueError(f"{place}: {what} '{twice[0]}' is given twice; measure it in a step of its own")
    for word, params in parsed:
        if "target" in params and params["target"] not in names:
            raise ValueError(
                f"{place}: {word}'s target '{params['target']}' has to be one of models: {', '.join(names)}"
            )


def domains_of(data: str | list[str] | Mapping[str, str] | None) -> dict[str, str]:
    """domain -> name of a data entry."""
    if data is None:
        return {}
    if isinstance(data, str):
        return {data: data}
    return dict(data) if isinstance(data, Mapping) else {name: name for name in data}


def measure(job: Job, item: Item, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The metric's result; it is given what it names: model, tokenizer, documents, base, progress, open_model, its
    parameters."""
    from fusion import sources, words

    metric: Callable[..., dict[str, Any]] = words.load("metrics", item.word)
    wanted = inspect.signature(metric).parameters
    said = f"{item.model}, {item.word}{f' on {item.domain}' if item.domain else ''}"
    offered: dict[str, Callable[[], Any]] = {
        "model": lambda: model,
        "tokenizer": lambda: tokenizer,
        "documents": lambda: job.documents(item.data),
        "base": lambda: job.recipe.base,
        "progress": lambda: lambda work: job.progress(work, said),
        "open_model": lambda: (
            lambda name: sources.load_model(job.model(name), str(model.dtype).partition(".")[2], device=job.device)
        ),
    }
    return metric(**{name: give() for name, give in offered.items() if name in wanted}, **item.params)


def merge(items: list[Item], folder: Path) -> dict[str, Any]:
    """{model: {metric: result}}, one level deeper (domain) for metrics that read documents."""
    merged: dict[str, Any] = {}
    for item in items:
        result = json.loads((folder / item.file).read_text(encoding="utf-8"))
        place = merged.setdefault(item.model, {})
        if item.domain:
            place.setdefault(item.word, {})[item.domain] = result
        else:
            place[item.word] = result
    return merged


def show(merged: dict[str, Any]) -> None:
    """A table on the terminal: a row for each model, a column for each measurement's first number."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, dict[str, Any]] = {}
    for model, metrics in merged.items():
        row = rows[model] = {}
        for word, result in metrics.items():
            if all(isinstance(value, dict) for value in result.values()):
                row.update({f"{word}\n{domain}": value for domain, value in result.items()})
            else:
                row[word] = result
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("model", *columns)
    for model, row in rows.items():
        table.add_row(model, *(_first(row[column]) if column in row else "" for column in columns))
    Console().print(table)


def _first(result: dict[str, Any]) -> str:
    numbers = [value for value in result.values() if isinstance(value, (int, float))]
    if not numbers:
        return ""
    error = result.get("stderr")
    return f"{numbers[0]:.4f}" + (f" ±{error:.4f}" if error else "")


def check(view: Any) -> None:
    """For planning: words, data and duplicates, without reading a model."""
    from fusion import words

    domains = domains_of(view.fields["data"])
    given, models = view.fields["metrics"], view.fields["models"]
    entries = given if isinstance(given, list) else [given]
    parsed = [words.parse("metrics", entry, f"{view.place}.metrics[{index}]") for index, entry in enumerate(entries)]
    _refuse_twice_and_strangers([models] if isinstance(models, str) else list(models), parsed, view.place)
    for index, (word, params) in enumerate(parsed):
        source = words.find("metrics", word).file.read_text(encoding="utf-8")
        if "documents" in _arguments(source, word.rpartition(".")[2]) and not domains:
            raise ValueError(f"{view.place}: {word} reads text and needs data: a name of the recipe's data, or several")
        if "path" in params and not (view.recipe.base / Path(params["path"]).expanduser()).exists():
            where = view.recipe.base / params["path"]
            raise ValueError(f"{view.place}.metrics[{index}].{word}.path: there is nothing at {where}")


def _arguments(source: str, name: str) -> list[str]:
    """The arguments of a function, from its source: metrics import torch, planning must not wait for it."""
    import ast

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return []
