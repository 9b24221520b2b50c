"""What steps `align` and the metric `barrier` left on disk, as frozen records: the numbers behind their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion._merge_report import percent
from fusion._pictures import count
from fusion._readings import is_number, optional_json
from fusion.recipe import Step

LEAST = 3  # names in a sentence before "and N more"


@dataclass(frozen=True)
class Alignment:
    """A finished align step: metrics.json as the step wrote it."""

    name: str
    target: str
    donor: str
    match: str
    found: Mapping[str, Any]

    @property
    def spaces(self) -> dict[str, dict[str, Any]]:
        return dict(self.found["spaces"])

    @property
    def sentences(self) -> list[str]:
        """What stays the target's, what is left out, which units are dead; nothing where all went over."""
        said = []
        units = {name: number for name, number in self.found.get("units_from_target", {}).items() if number}
        if self.found.get("from_target"):
            parts: dict[str, list[str]] = {}
            for part, reason in self.found["from_target"].items():
                parts.setdefault(reason, []).append(part)
            said += [f"From {self.target} itself: {_some(names)} ({reason})." for reason, names in parts.items()]
        if units:
            said.append(f"Units of {self.target} itself, for want of a counterpart in {self.donor}: {_counts(units)}.")
        if self.found.get("left_out"):
            said.append(f"{self.target} has no place for {_some(self.found['left_out'])} of {self.donor}.")
        for side, name in enumerate((self.target, self.donor)):
            dead = {space: two[side] for space, two in self.found.get("dead", {}).items() if two[side]}
            if dead:
                said.append(f"Units of {name} that never vary on the data went by their weights: {_counts(dead)}.")
        return said


@dataclass(frozen=True)
class Crossing:
    """A model's losses on the line from a target's weights to its own: (share of the model, bits per byte)."""

    model: str
    barrier: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Barriers:
    """All crossings from one target on one domain."""

    target: str
    domain: str
    crossings: tuple[Crossing, ...]


def read_alignment(step: Step, directory: Path) -> Alignment | None:
    """An align step's metrics.json; None where it left none. ValueError names what is malformed."""
    path = directory / "metrics.json"
    found = optional_json(path)
    if not found:
        return None
    odd = next((name for name in ("spaces", "distance") if not isinstance(found.get(name), dict)), None)
    if odd is not None:
        raise ValueError(f"{path}: {odd} should be an object, it is {found.get(odd)!r:.60}")
    return Alignment(step.out, str(found.get("target")), str(found.get("donor")), str(found.get("match")), found)


def read_barriers(steps: Sequence[tuple[Step, Path]]) -> list[Barriers]:
    """The curves of all evaluate steps, by target and domain; a model has none to itself."""
    found: dict[tuple[str, str], list[Crossing]] = {}
    for _, directory in steps:
        path = directory / "metrics.json"
        for model, metrics in optional_json(path).get("models", {}).items():
            for domain, result in metrics.get("barrier", {}).items():
                target = result.get("target")
                if target is None or model == target:
                    continue
                curve = result.get("curve", [])
                if not curve or not all(len(point) == 2 and all(map(is_number, point)) for point in curve):
                    raise ValueError(f"{path}: models.{model}.barrier.{domain}.curve should be pairs of finite numbers")
                one = Crossing(model, float(result["barrier"]), tuple((x, y) for x, y in curve))
                found.setdefault((str(target), domain), []).append(one)
    return [Barriers(target, domain, tuple(many)) for (target, domain), many in found.items()]


def lead(one: Alignment) -> str:
    """What was matched by what, and how much nearer the donor's weights came."""
    by = f"by {one.match} on {one.found.get('features', 'weights')}"
    tokens = one.found.get("tokens")
    by += f" of {count(tokens)} tokens" if is_number(tokens) else ""
    folded = ", norm gains folded for the search" if one.found.get("folded") else ""
    said = f"{one.donor} in the units of {one.target}, {by}{folded}."
    apart = one.found["distance"]
    if is_number(apart.get("aligned")):
        before = f"{_tight(apart['naive'])} as they are and " if is_number(apart.get("naive")) else ""
        said += f" Their weights lie apart by {before}{_tight(apart['aligned'])} aligned, of {one.target}'s length."
    layers = one.found.get("layers")
    if layers:
        pairs = ", ".join(f"{own}\u2190{other}" for own, other in layers.items())
        said += f" Layers, target\u2190donor: {pairs}."
    return said


def _tight(share: float) -> str:
    return percent(share).replace(" ", "\u00a0")


def _counts(units: Mapping[str, int]) -> str:
    return _some([f"{count(number)} of {name}" for name, number in units.items()])


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - LEAST} more" if len(names) > LEAST else ""
    return ", ".join(names[:LEAST]) + rest
