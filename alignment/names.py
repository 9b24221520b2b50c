"""Tensors of two models that correspond by name, though not one to one: a table of rules, checked against both headers.

As in AdaMMS (Du et al. 2025, arXiv:2503.23733), where such rules are scripts. A table is `{own name: the target's}`, or
a list of rules, each of which names tensors of the model and says what they are in the target:

    {rename: a, to: b}                    a is b
    {concatenate: [a, b, c], to: d}       d is a, b and c one after the other (on `axis: 0`)
    {split: a, to: [b, c]}                a is b and c one after the other (on `axis: 0`), cut as the target's are
    {duplicate: a, to: [b, c]}            a is b, and c too
    {leave: a}                            a has no counterpart

A name may hold `*`, which stands for the same text in all names of a rule. A tensor may serve several rules, but
`rename` and `leave` take only what no rule before them took, so that `*` can mean the rest. What no rule takes keeps
its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Made", "Rule", "correspond", "mapped", "rules"]

VERBS = ("rename", "concatenate", "split", "duplicate", "leave")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """What tensors called `own` are in the target."""

    verb: str
    own: tuple[str, ...]
    to: tuple[str, ...]
    axis: int = 0

    def __str__(self) -> str:
        return f"{self.verb} {', '.join(self.own)}{' to ' if self.to else ''}{', '.join(self.to)}"


@dataclass(frozen=True)
class Made:
    """A tensor of the target: stretches of a model's tensors (name, start, length), one after the other on `axis`."""

    shape: Shape
    axis: int
    stretches: tuple[tuple[str, int, int], ...]

    def tensor(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """It, from the model's tensors."""
        if len(self.stretches) == 1 and tensors[self.stretches[0][0]].shape == self.shape:
            return tensors[self.stretches[0][0]]
        return torch.cat([tensors[name].narrow(self.axis, *cut) for name, *cut in self.stretches], self.axis)

    def runs(self, shapes: Mapping[str, Shape], start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Where its flattened elements [start, stop) lie: own name, first element there, place in the range, count."""
        inner = 1
        for size in self.shape[self.axis + 1 :]:
            inner *= size
        step = inner * self.shape[self.axis] if self.shape else 1
        for outer in range(start // max(step, 1), -(-stop // max(step, 1))):
            at = outer * step
            for name, first, length in self.stretches:
                low, high = max(at, start), min(at + length * inner, stop)
                if low < high:
                    own = outer * (shapes[name][self.axis] if self.shape else 1) * inner + first * inner
                    yield name, own + low - at, low - start, high - low
                at += length * inner


def rules(table: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Rule]:
    """The rules of a table as a recipe writes it; ValueError for what is none."""
    if isinstance(table, Mapping):
        return [
            Rule(
                "leave" if to is None else "rename" if isinstance(to, str) else "duplicate",
                _names(own, "a table"),
                _names(to, own),
            )
            for own, to in table.items()
        ]
    found = []
    for entry in table if isinstance(table, Sequence) and not isinstance(table, str) else [table]:
        verbs = [key for key in entry if key in VERBS] if isinstance(entry, Mapping) else []
        if len(verbs) != 1:
            raise ValueError(f"a rule is {{rename: NAME, to: NAME}}, or with {', '.join(VERBS[1:])}; not {entry!r:.80}")
        verb = verbs[0]
        allowed = (
            {verb} | ({"to"} if verb != "leave" else set()) | ({"axis"} if verb in ("concatenate", "split") else set())
        )
        odd = next((key for key in entry if key not in allowed), None)
        if odd is not None:
            raise ValueError(
                f"{verb} takes {' and '.join(sorted(allowed - {verb})) or 'nothing'} beside it, not '{odd}'"
            )
        own, to = _names(entry[verb], verb), _names(entry.get("to"), verb)
        many = {"concatenate": (2, 1), "split": (1, 2), "duplicate": (1, 2), "rename": (1, 1)}.get(verb)
        if many is not None and ((len(own) > 1) != (many[0] > 1) or (len(to) > 1) != (many[1] > 1) or not to):
            raise ValueError(f"{verb} takes {_several(many[0])} to {_several(many[1])}; given: {dict(entry)!r:.80}")
        axis = entry.get("axis", 0)
        if not isinstance(axis, int) or isinstance(axis, bool) or axis < 0:
            raise ValueError(f"{verb}: axis is a number from 0 on, not {axis!r}")
        found += [Rule(verb, own, to, axis)] if verb != "leave" else [Rule(verb, (one,), ()) for one in own]
    return found


def _several(count: int) -> str:
    return "one name" if count == 1 else "two or more names"


def _names(value: Any, what: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else () if value is None else tuple(value) if _is_list(value) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what}: a name or a list of names is needed here, not {value!r:.80}")
    return names


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence)


def correspond(
    table: Mapping[str, Any] | Sequence[Mapping[str, Any]], own: Mapping[str, Shape], target: Mapping[str, Shape]
) -> dict[str, Made]:
    """What each tensor of the target that a model has is made of, by the names and shapes of both.

    Raises ValueError for a rule that fits nothing, a tensor that nothing says the place of, one that would be two
    things, a name that the target does not have and sizes that do not add up.
    """
    found: dict[str, Made] = {}
    taken: set[str] = set()

    def put(name: str, made: Made) -> None:
        if name not in target:
            raise ValueError(
                f"{made.stretches[0][0]} would be {name}, which the target does not have; if it has no counterpart, "
                f"say so: {{leave: {made.stretches[0][0]}}}"
            )
        if name in found:
            raise ValueError(f"{found[name].stretches[0][0]} and {made.stretches[0][0]} would both be {name}")
        found[name] = made

    for rule in rules(table):
        fitting = [(name, stars) for name in own if (stars := _stars(rule.own[0], name)) is not None]
        if rule.verb in ("rename", "leave"):
            fitting = [(name, stars) for name, stars in fitting if name not in taken]
        if not fitting:
            raise ValueError(f"no tensor that is left is called like '{rule.own[0]}'")
        for name, stars in fitting:
            parts = [name, *(_filled(pattern, stars, rule) for pattern in rule.own[1:])]
            lacking = [one for one in parts if one not in own]
            if lacking:
                raise ValueError(f"{rule}: there is no tensor {lacking[0]}")
            taken.update(parts)
            goals = [_filled(pattern, stars, rule) for pattern in rule.to]
            for goal, made in zip(goals, _made(rule, parts, goals, own, target)):
                put(goal, made)
    rest = [name for name in own if name not in taken]
    lost = [name for name in rest if name not in target]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"nothing says what {', '.join(lost[:3])}{more} would be in the target; add rules, or {{leave: ...}}"
        )
    for name in rest:
        put(name, _whole(name, own))
    return found


def mapped(
    tensors: Mapping[str, Tensor], table: Mapping[str, Any] | Sequence[Mapping[str, Any]], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A model's tensors under the names of a target, for those of the target's that it has; they may share memory.

    Raises ValueError for those of other shapes, besides what `correspond` does.
    """
    own, wanted = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (tensors, target))
    found = correspond(table, own, wanted)
    for name, made in found.items():
        if made.shape != wanted[name]:
            raise ValueError(f"what would be {name} is {_x(made.shape)}, and it is {_x(wanted[name])} in the target")
    return {name: made.tensor(tensors) for name, made in found.items()}


def _made(
    rule: Rule, parts: Sequence[str], goals: Sequence[str], own: Mapping[str, Shape], target: Mapping[str, Shape]
) -> list[Made]:
    if rule.verb in ("rename", "duplicate"):
        return [_whole(parts[0], own)] * len(goals)
    if rule.verb == "leave":
        return []
    axis, shape = rule.axis, own[parts[0]]
    if axis >= len(shape):
        raise ValueError(f"{rule}: {parts[0]} has {len(shape)} axes, and no axis {axis}")
    if rule.verb == "concatenate":
        for one in parts:
            if own[one][:axis] + own[one][axis + 1 :] != shape[:axis] + shape[axis + 1 :] or len(own[one]) != len(
                shape
            ):
                raise ValueError(
                    f"{rule}: {one} is {_x(own[one])} and {parts[0]} {_x(shape)}; only axis {axis} may differ"
                )
        size = sum(own[one][axis] for one in parts)
        cuts = tuple((one, 0, own[one][axis]) for one in parts)
        return [Made((*shape[:axis], size, *shape[axis + 1 :]), axis, cuts)]
    lacking = [goal for goal in goals if goal not in target]
    if lacking:
        raise ValueError(f"{rule}: the target has no {lacking[0]}")
    sizes = [target[goal][axis] if axis < len(target[goal]) else 0 for goal in goals]
    if sum(sizes) != shape[axis]:
        raise ValueError(f"{rule}: {parts[0]} has {shape[axis]} on axis {axis}, and {', '.join(goals)} have {sizes}")
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        Made((*shape[:axis], size, *shape[axis + 1 :]), axis, ((parts[0], start, size),))
        for start, size in zip(starts, sizes)
    ]


def _whole(name: str, own: Mapping[str, Shape]) -> Made:
    return Made(own[name], 0, ((name, 0, own[name][0] if own[name] else 1),))


def _x(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _stars(pattern: str, name: str) -> tuple[str, ...] | None:
    """What each * of a pattern stands for in a name; None where it does not fit."""
    found = re.fullmatch("(.*)".join(re.escape(part) for part in pattern.split("*")), name)
    return found.groups() if found else None


def _filled(pattern: str, stars: tuple[str, ...], rule: Rule) -> str:
    if pattern.count("*") > len(stars):
        raise ValueError(f"{rule}: '{pattern}' has more * than '{rule.own[0]}'")
    texts = iter(stars)
    return "".join(part if part != "*" else next(texts) for part in re.split(r"(\*)", pattern))
