"""Who is who in a recipe, and one honest sentence about whether fusion paid, from the recipe and the numbers alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion._readings import Score, Scores
from fusion.recipe import Step

ROLES = ("target", "teacher", "baseline", "fused", "other")
JOINS = ("merge", "zip", "least_squares")  # steps whose `models` become one


@dataclass(frozen=True)
class Difference:
    """Bits per byte of `model` minus those of `against` on one domain: below zero is better.

    `stderr` is that of the difference itself, over documents that both models read; None where the metric left no
    numbers of each document. (The models' own errors say how much texts differ, and would drown a difference on the
    same text.)
    """

    model: str
    against: str
    domain: str
    bits_per_byte: float
    stderr: float | None

    @property
    def level(self) -> bool:
        """Whether the difference is too small to call: within one standard error, or 0.000 as printed."""
        return abs(self.bits_per_byte) < max(0.0005, self.stderr or 0.0)


def roles(steps: Sequence[Step]) -> dict[str, str]:
    """Model name -> role.

    target: what a distill step starts from (or a merge's base). teacher: who was recorded (or joined). fused: what
    distill steps and joins make, and what is tuned from that. baseline: what a tune step makes of a target.
    """
    found: dict[str, str] = {}
    starts = {str(step.fields["model"]) for step in steps if step.verb == "distill"}
    starts |= {str(step.fields["base"]) for step in steps if step.verb == "merge" and step.fields.get("base")}
    for step in steps:
        if step.verb == "record":
            found[str(step.fields["teacher"])] = "teacher"
        if step.verb in JOINS:
            found |= {str(name): "teacher" for name in step.fields.get("models", ()) if name not in found}
    for step in steps:
        start = str(step.fields.get("model", ""))
        if step.verb == "tune" and step.out and start in starts:
            found[step.out] = "baseline"
    found |= dict.fromkeys(starts, "target")
    for step in steps:
        made_of_fused = step.verb == "tune" and found.get(str(step.fields.get("model", ""))) == "fused"
        if step.out and (step.verb in ("distill", *JOINS) or made_of_fused):
            found[step.out] = "fused"
    return found


def start_of(name: str, steps: Sequence[Step]) -> str | None:
    """The model that the step which made `name` started from; None for a model that no training or merge step made."""
    for step in steps:
        if step.out == name and step.verb in ("distill", "tune"):
            return str(step.fields["model"])
        if step.out == name and step.verb == "merge" and step.fields.get("base"):
            return str(step.fields["base"])
    return None


def origin(name: str, steps: Sequence[Step], role: Mapping[str, str]) -> str | None:
    """The nearest ancestor of `name` that is not itself fused."""
    start = start_of(name, steps)
    while start is not None and role.get(start) == "fused":
        start = start_of(start, steps)
    return start


def rival(name: str, steps: Sequence[Step], role: Mapping[str, str], scores: Mapping[str, Scores]) -> str | None:
    """What a fused model must beat: the best-scored baseline from the same start; without one, that start itself."""
    start = origin(name, steps, role)
    same = [
        step.out
        for step in steps
        if step.out and role.get(step.out) == "baseline" and start_of(step.out, steps) == start
    ]
    measured = [model for model in same if model in scores and differences(name, model, scores)]
    if measured:
        return min(measured, key=lambda model: sum(d.bits_per_byte for d in differences(model, name, scores)))
    return start if start in scores else None


def differences(model: str, against: str, scores: Mapping[str, Scores]) -> list[Difference]:
    """One difference per domain that both were measured on, in the order they were measured."""
    if model not in scores or against not in scores:
        return []
    ours, theirs = scores[model].bits_per_byte, scores[against].bits_per_byte
    found = []
    for domain in ours:
        if domain in theirs:
            a, b = ours[domain], theirs[domain]
            found.append(Difference(model, against, domain, a.bits_per_byte - b.bits_per_byte, paired_error(a, b)))
    return found


def paired_error(a: Score, b: Score) -> float | None:
    """Standard error of a's bits per byte minus b's as a ratio over the same D > 1 documents; None without them."""
    sizes = [size for _, size in a.documents]
    if len(sizes) < 2 or sizes != [size for _, size in b.documents] or not sum(sizes):
        return None
    gaps = [x - y for (x, _), (y, _) in zip(a.documents, b.documents, strict=True)]
    ratio = sum(gaps) / sum(sizes)
    spread = sum((gap - ratio * size) ** 2 for gap, size in zip(gaps, sizes, strict=True))
    return math.sqrt(spread * len(sizes) / (len(sizes) - 1)) / sum(sizes)


def hero(result: str | None, steps: Sequence[Step], role: Mapping[str, str]) -> str | None:
    """The fused model that the page speaks about: the recipe's result when that is fused, else the last one made."""
    made = [step.out for step in steps if step.out and role.get(step.out) == "fused"]
    return result if result in made else (made[-1] if made else None)


def verdict(result: str | None, steps: Sequence[Step], scores: Mapping[str, Scores]) -> list[str]:
    """One sentence, and where it can be said a second one on how much of the way to the teacher was made."""
    role = roles(steps)
    model = hero(result, steps, role)
    if model is None:
        return [_leaders(scores)]
    against = rival(model, steps, role, scores)
    if against is None:
        return [f"{model} was made, and not compared: no evaluate step measured it beside its start or a baseline."]
    found = differences(model, against, scores)
    if not found:
        return [f"{model} was made, and its bits per byte were not measured on a domain shared with {against}."]
    continued = role.get(against) == "baseline"
    named = f"continued training ({against})" if continued else f"{against}, where it started"
    sentences = [_compare(model, named, found)]
    if not continued:
        sentences.append("No baseline was trained, so nothing is known against continued training on the same text.")
    return sentences + _way(model, against if continued else None, steps, role, scores)


def _compare(model: str, named: str, found: Sequence[Difference]) -> str:
    better = [d for d in found if not d.level and d.bits_per_byte < 0]
    worse = [d for d in found if not d.level and d.bits_per_byte > 0]
    level = [d for d in found if d.level]
    if not better and not worse:
        return f"{model} is level with {named} on {_and([d.domain for d in level])}: no difference beyond the error."
    parts: list[str] = []
    for word, group in (("better", better), ("worse", worse)):
        ordered = sorted(group, key=lambda d: -abs(d.bits_per_byte))
        for position, d in enumerate(ordered):
            amount = f"{abs(d.bits_per_byte):.3f}"
            if parts:
                parts.append(f"{amount} on {d.domain}" if position else f"{amount} {word} on {d.domain}")
            else:
                parts.append(f"{amount} bits per byte {word} than {named} on {d.domain}")
    if level:
        parts.append(f"level on {_and([d.domain for d in level])}")
    return f"{model} {'is' if better else 'lost: it is'} {_and(parts)}."


def _way(
    model: str, baseline: str | None, steps: Sequence[Step], role: Mapping[str, str], scores: Mapping[str, Scores]
) -> list[str]:
    """The share of the gap between start and teacher that was closed, where a teacher is clearly ahead of the start."""
    start = origin(model, steps, role)
    gaps = [
        gap
        for teacher in scores
        if role.get(teacher) == "teacher" and start is not None
        for gap in differences(start, teacher, scores)
        if gap.bits_per_byte > 0.01 and not gap.level
    ]
    if start is None or not gaps:
        return []
    widest = max(gaps, key=lambda gap: gap.bits_per_byte)

    def share(name: str) -> str:
        gain = [-d.bits_per_byte for d in differences(name, start, scores) if d.domain == widest.domain]
        return f"{100 * gain[0] / widest.bits_per_byte:.0f} %" if gain else "an unknown share"

    continued = f"; continued training closes {share(baseline)}" if baseline else ""
    gap = f"the gap between {start} and its teacher {widest.against}"
    return [f"On {widest.domain} it closes {share(model)} of {gap}{continued}."]


def _leaders(scores: Mapping[str, Scores]) -> str:
    """Who has the lowest bits per byte where, for a recipe that fuses nothing."""
    domains = list(dict.fromkeys(domain for score in scores.values() for domain in score.bits_per_byte))
    if not domains:
        return "Nothing was fused and nothing was evaluated in this run."
    parts = []
    for domain in domains:
        measured = {
            name: score.bits_per_byte[domain] for name, score in scores.items() if domain in score.bits_per_byte
        }
        best = min(measured, key=lambda name: measured[name].bits_per_byte)
        parts.append(f"{best} needs {measured[best].bits_per_byte:.3f} bits per byte on {domain}")
    return f"{'Nothing was fused. Lowest of each domain: ' if len(scores) > 1 else ''}{_and(parts)}."


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
