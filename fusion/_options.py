"""The command line of `fusion run`, which every launcher hands on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion import recipe


@dataclass(frozen=True)
class Options:
    """A command line of `fusion run`."""

    recipe: str
    out: str = "runs"
    only: str | None = None
    dry_run: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def parse(arguments: Sequence[str]) -> Options:
    """Reads a command line. --local_rank=N, which DeepSpeed's launcher puts first, is dropped wherever it stands."""
    given: dict[str, Any] = {"overrides": {}}
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if "recipe" in given:
                raise ValueError(f"one recipe is needed, and '{word}' comes after '{given['recipe']}'")
            given["recipe"] = word
            continue
        name, equals, value = word[2:].partition("=")
        if name in ("dry-run", "dry_run"):
            given["dry_run"] = True
            continue
        if not equals and left and not left[0].startswith("--"):
            value, equals = left.pop(0), "="
        if name in ("local_rank", "local-rank"):
            continue
        if name in ("out", "only"):
            if not equals:
                raise ValueError(f"--{name} needs a value")
            given[name] = value
        elif "recipe" not in given:
            raise ValueError(f"--{name} comes before the recipe; train fields come after it")
        else:
            given["overrides"][name.replace("-", "_")] = recipe.scalar(value) if equals else True
    if "recipe" not in given:
        raise ValueError("a recipe is needed: fusion run RECIPE")
    return Options(**given)
