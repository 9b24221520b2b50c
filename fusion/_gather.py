"""All that a report says, gathered from the recipe and the step directories into one record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion import _verdict
from fusion._align_report import Alignment, Barriers, read_alignment, read_barriers
from fusion._merge_report import Merge, read_merge
from fusion._readings import Ran, Scores, Store, Training, read_scores, read_step, read_store, read_training
from fusion._tax import Tax, sentences, taxes
from fusion._verdict import Difference
from fusion.recipe import Recipe, Step


@dataclass(frozen=True)
class Model:
    """A model of the run: its part in it, where it comes from, and what was measured on it."""

    name: str
    role: str  # one of _verdict.ROLES
    start: str | None  # the model it was trained or merged from
    source: dict[str, Any]  # the recipe's own words for a model that no step made
    scores: Scores


@dataclass(frozen=True)
class Report:
    """All that the page, the card and report.json say."""

    recipe: str
    file: str
    text: str
    command: str
    seed: int
    result: str | None
    verdict: list[str]
    hero: str | None  # the fused model the verdict is about
    rival: str | None  # what it is compared with
    models: list[Model]
    differences: list[Difference]  # every fused model against its rival
    stores: list[Store]
    training: list[Training]
    taxes: list[Tax]
    merges: list[Merge]
    alignments: list[Alignment]
    barriers: list[Barriers]
    steps: list[Ran]

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(step.seconds for step in self.steps)

    @property
    def domains(self) -> list[str]:
        """Every domain that something was measured on, in the order of measuring."""
        return list(dict.fromkeys(domain for model in self.models for domain in model.scores.bits_per_byte))


def gather(recipe: Recipe, steps: Sequence[tuple[Step, Path]]) -> Report:
    """Reads the step directories once."""
    role = _verdict.roles(recipe.steps)
    scores = read_scores([(step, directory) for step, directory in steps if step.verb != "merge"])
    made = [step.out for step in recipe.steps if step.verb not in ("record", "evaluate", "align")]
    names = dict.fromkeys([*recipe.models, *made, *scores])
    models = [
        Model(
            name=name,
            role=role.get(name, "other"),
            start=_verdict.start_of(name, recipe.steps),
            source=_source(recipe, name),
            scores=scores.get(name, Scores()),
        )
        for name in names
    ]
    models.sort(key=lambda model: _verdict.ROLES.index(model.role))  # stable: the recipe's order within a role
    rivals = {m.name: _verdict.rival(m.name, recipe.steps, role, scores) for m in models if m.role == "fused"}
    hero = _verdict.hero(recipe.result, recipe.steps, role)
    training = [read_training(step, directory) for step, directory in steps if step.verb in ("distill", "tune")]
    paid = taxes(training, scores)
    return Report(
        recipe=recipe.name,
        file=str(recipe.path),
        text=recipe.path.read_text(encoding="utf-8"),
        command=" ".join(
            ["fusion run", str(recipe.path), *(f"--{key} {scalar(value)}" for key, value in recipe.overrides.items())]
        ),
        seed=recipe.seed,
        result=recipe.result,
        verdict=sentences(paid, recipe.result)
        if paid and hero is None
        else _verdict.verdict(recipe.result, recipe.steps, scores),
        hero=hero,
        rival=rivals.get(hero) if hero is not None else None,
        models=models,
        differences=[
            d for name, rival in rivals.items() if rival is not None for d in _verdict.differences(name, rival, scores)
        ],
        stores=[read_store(step, directory) for step, directory in steps if step.verb == "record"],
        training=training,
        taxes=paid,
        merges=[
            merge
            for step, directory in steps
            if step.verb == "merge" and (merge := read_merge(step, directory)) is not None
        ],
        alignments=[
            one
            for step, directory in steps
            if step.verb == "align" and (one := read_alignment(step, directory)) is not None
        ],
        barriers=read_barriers([(step, directory) for step, directory in steps if step.verb == "evaluate"]),
        steps=[read_step(step, directory) for step, directory in steps],
    )


def _source(recipe: Recipe, name: str) -> dict[str, Any]:
    """A model's entry in the recipe without what was left out."""
    if name not in recipe.models:
        return {}
    return {
        key: value
        for key, value in vars(recipe.models[name]).items()
        if value is not None and key not in ("name", "place")
    }


def scalar(value: object) -> str:
    """A value as it is typed after --key."""
    return str(value).lower() if isinstance(value, bool) else str(value)
