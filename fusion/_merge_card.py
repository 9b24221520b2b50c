"""README.md of a merge without a recipe: a model card that Hugging Face's hub reads, with the command inside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusion import __version__, words
from fusion._markdown import fence, front_matter, text

BLOB = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")  # in the hub's cache


def merge_card(
    out: Path,
    method: str,
    models: Mapping[str, str],  # name -> where it was read from
    base: str | None,
    weights: Sequence[float] | None,
    settings: Mapping[str, Any],  # what else was said
    command: str,
    *,
    sentences: Sequence[str] = (),  # what a reader should know first
    adapters: bool = False,
) -> str:
    """The card as Markdown with YAML front matter; without a licence, because that follows from the sources'."""
    places = {**({"base": base} if base is not None else {}), **models}
    hubs = [hub for place in places.values() if (hub := _hub(place)) is not None]
    front: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    if hubs:
        front |= {"base_model": [hub.partition(" ")[0] for hub in hubs], "base_model_relation": "merge"}
    front["tags"] = ["fusion", "merge", *["lora"] * adapters]
    shares = dict(zip(models, [1.0] * len(models) if weights is None else weights, strict=True))
    config = {
        "method": method,
        **({"base": base} if base is not None else {}),
        "models": {name: {"path": place, "weight": shares[name]} for name, place in models.items()},
        **{name: value for name, value in settings.items() if value not in (None, (), [], {})},
    }
    word = words.find("merge", method)
    source = (words.module(word).__doc__ or word.summary).split("\n\n")[0]
    what = "adapters" if adapters else "models"
    around = "" if base is None else f" around {text(base)}"
    parts = [
        front_matter(front),
        f"# {text(out.name)}",
        f"{len(models)} {what} merged by `{method}`{around}, with fusion {__version__}.",
        *map(text, sentences),
        "## How it was made",
        text(source),
        f"    {command}",
        fence(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)),
        "## Sources",
        "\n".join(f"* **{text(name)}**: {text(_hub(place) or place)}" for name, place in places.items()),
        "## Limits",
        "Nothing was measured on it. Licences and limits of the sources above hold for this model too.",
    ]
    return "\n\n".join(parts) + "\n"


def _hub(place: str) -> str | None:
    """The repository and commit of a directory in the hub's cache."""
    found = BLOB.search(str(Path(place).absolute()))
    return None if found is None else f"{found['owner']}/{found['name']} at {found['commit']}"
