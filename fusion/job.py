"""What a step's function is given besides the recipe's fields: where to write, its rank, names to paths."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusion._keys import cache_directory
from fusion._progress import Progress
from fusion._say import nearest
from fusion.recipe import DataRef, Recipe

if TYPE_CHECKING:
    from fusion._ranks import Ranks
    from fusion.checkpoint import Source
    from fusion.data import Document

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One step on one rank.

    `directory` is visible to all ranks, survives a kill and is renamed when the step has returned on rank 0.
    """

    name: str
    directory: Path
    recipe: Recipe
    seed: int = 0
    rank: int = 0
    world: int = 1
    device: str = "cpu"  # what this rank computes on: cpu, cuda:1, ...
    place: str = ""  # where the step stands in the recipe, for sentences
    outputs: Mapping[str, Path] = field(default_factory=dict)  # earlier steps' directories
    cache: Path = field(default_factory=cache_directory)
    ranks: "Ranks | None" = None
    after: ExitStack = field(default_factory=ExitStack)  # what lasts until the step's directory is sealed

    def model(self, name: str) -> Path:
        """The directory (config.json, *.safetensors, tokenizer.json) of a recipe's model or of an earlier output."""
        if name in self.outputs:
            return self.outputs[name]
        if name not in self.recipe.models:
            known = [*self.recipe.models, *self.outputs]
            raise ValueError(f"{self.place}: no model is called '{name}'{nearest(name, known)}")
        return resolve_model(self.recipe, name, self.cache)

    def source(self, name: str) -> "Source":
        """The same model to be read by region: adapters and training checkpoints in place, without a copy."""
        from fusion.checkpoint import Checkpoint

        if name in self.recipe.models and name not in self.outputs:
            return source_model(self.recipe, name, self.cache)
        return Checkpoint.open(self.model(name))

    def data(self, name: str) -> DataRef:
        """The recipe's data entry of that name."""
        if name not in self.recipe.data:
            raise ValueError(f"{self.place}: no data are called '{name}'{nearest(name, self.recipe.data)}")
        return self.recipe.data[name]

    def documents(self, name: str) -> "Sequence[Document]":
        """The documents of a data entry, in a fixed order."""
        from fusion import data

        return data.documents(self.data(name), self.recipe.base, self.recipe.data)

    def store(self, name: str) -> Path:
        """The directory that the earlier step `name` made."""
        if name not in self.outputs:
            raise ValueError(f"{self.place}: no earlier step made '{name}'{nearest(name, self.outputs)}")
        return self.outputs[name]

    def progress(self, work: Iterable[T] | int, description: str, total: int | None = None) -> Progress[T]:
        """Iterate over it, or `with job.progress(total, "training") as bar: bar.advance()`; shown on rank 0."""
        return Progress(work, description, total, show=self.rank == 0)

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """directory/metrics.json, what the step found; for rank 0."""
        text = json.dumps(metrics, indent=1) + "\n"
        (self.directory / "metrics.json").write_text(text, encoding="utf-8")

    def log(self, **metrics: Any) -> None:
        """One line of directory/log.jsonl, written by rank 0."""
        if self.rank == 0:
            with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Returns when `ready()` is true; ends with one sentence when a rank that has to do it stopped."""
        if self.ranks is not None:
            self.ranks.wait(ready, what)
            return
        while not ready():
            time.sleep(0.1)


def resolve_model(recipe: Recipe, name: str, cache: Path) -> Path:
    """The directory of a recipe's model: in place, downloaded, converted or made once."""
    from fusion import sources

    texts = _texts(recipe)
    return sources.resolve(name, recipe.models[name], cache, recipe.base, texts, recipe.seed, recipe.models)


def source_model(recipe: Recipe, name: str, cache: Path) -> "Source":
    """A recipe's model to be read by region, without a copy of what is put together only when it is read."""
    from fusion import _composed

    return _composed.source(name, recipe.models[name], cache, recipe.base, _texts(recipe), recipe.seed, recipe.models)


def _texts(recipe: Recipe) -> Callable[[str], Iterator[str]]:
    from fusion import data

    def texts(source: str) -> Iterator[str]:
        for document in data.documents(recipe.data[source], recipe.base, recipe.data):
            yield document.text if document.messages is None else "\n".join(m["content"] for m in document.messages)

    return texts
