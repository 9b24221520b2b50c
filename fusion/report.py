"""What a run found: report.json, report.html with its pictures inside, and README.md, a model card with the recipe."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion._card import card
from fusion._gather import Report, gather
from fusion._merge_report import Merge
from fusion._page import page
from fusion._readings import is_number
from fusion.recipe import Recipe, Step

SCHEMA = 1


def write(run: Path, recipe: Recipe, steps: Sequence[tuple[Step, Path]]) -> Path:
    """Writes report.json, report.html and README.md into the run's directory; the path of report.html.

    steps: (step, its directory), in the recipe's order, all of them done. Each file is replaced in one move. ValueError
    names the file and the field when a step left something malformed.
    """
    report = gather(recipe, steps)
    replace(run / "report.json", json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    replace(run / "README.md", card(report))
    replace(run / "report.html", page(report))
    return run / "report.html"


def as_json(report: Report) -> dict[str, Any]:
    """The report as docs/report.md describes it: plain JSON values, no NaN."""
    return {
        "schema": SCHEMA,
        "recipe": {
            "name": report.recipe,
            "file": report.file,
            "seed": report.seed,
            "result": report.result,
            "text": report.text,
        },
        "command": report.command,
        "verdict": report.verdict,
        "hero": report.hero,
        "rival": report.rival,
        "seconds": round(report.seconds, 3),
        "models": {
            model.name: {
                "role": model.role,
                "start": model.start,
                "source": plain(model.source),
                "bits_per_byte": {
                    domain: {"bits_per_byte": score.bits_per_byte, "stderr": score.stderr, "bytes": score.bytes}
                    for domain, score in model.scores.bits_per_byte.items()
                },
                "blimp": {"accuracy": model.scores.blimp_accuracy, "paradigms": model.scores.blimp},
                "other": model.scores.other,
            }
            for model in report.models
        },
        "differences": [{**vars(d), "level": d.level} for d in report.differences],
        "stores": {store.name: {"teacher": store.teacher, **store.numbers} for store in report.stores},
        "training": {one.name: plain(vars(one)) for one in report.training},
        "taxes": [plain({**vars(tax), "bits_per_byte": [vars(d) for d in tax.bits_per_byte]}) for tax in report.taxes],
        "merges": {merge.name: as_merge(merge) for merge in report.merges},
        "alignments": {one.name: {**plain(one.found), "sentences": one.sentences} for one in report.alignments},
        "barriers": [plain({**vars(one), "crossings": [vars(c) for c in one.crossings]}) for one in report.barriers],
        "steps": [plain(vars(one)) for one in report.steps],
    }


def as_merge(merge: Merge) -> dict[str, Any]:
    """A merge over all its tensors; each one's numbers stay in the step's metrics.json."""
    names = ("method", "params", "models", "weights", "base", "lengths", "base_length", "cosines")
    found = {name: plain(value) for name in (*names, "conflict", "moved", "kept") for value in [getattr(merge, name)]}
    return {**found, "sentences": merge.sentences, **merge.numbers}


def plain(value: Any) -> Any:
    """`value` in JSON's own types: what is not finite becomes null, what JSON has no type for its text."""
    if value is None or isinstance(value, (bool, str)) or is_number(value):
        return value
    if isinstance(value, float):
        return None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value)


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
