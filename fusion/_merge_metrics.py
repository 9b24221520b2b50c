"""What a merge says about itself: metrics.json, from the readings that were noted down tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusion._deal import Share
from fusion._manifest import Manifest
from fusion._merge_plan import Planned
from fusion._names import kind, split
from fusion._observe import reading
from fusion._regions import key
from fusion._tasks import Task
from fusion.merge._x import Sum, joined

ACTIONS = {"merge": "merged", "copy": "copied", "same": "copied", "equal": "equal"}
OBSERVED = ("gram", "sampled", "conflict", "kept")


def metrics(plan: Planned, shares: Sequence[Share], manifest: Manifest) -> dict[str, Any]:
    """One entry a tensor, and what holds for all of them."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for share in shares:
        line = manifest.lines[key(share.task, share.start, share.stop)]
        parts.setdefault(share.task.name, []).append(line)
    found = {task.name: _added(parts[task.name]) for task in plan.tasks}
    entries = [_entry(task, parts[task.name][0]["action"], found[task.name]) for task in plan.tasks]
    weighed = plan.recipe is not None and "weights" in plan.recipe.method.needs
    weights = plan.recipe.weights.tolist() if plan.recipe is not None and weighed else None
    return {
        "method": plan.given["method"],
        "params": plan.given["params"],
        "models": list(plan.inputs.models),
        "weights": weights,
        "weight_sum": None if weights is None else sum(weights),
        "base": None if plan.inputs.base is None else str(plan.inputs.base.path),
        "readings": _totals(list(found.values())),
        "tensors": entries,
    }


def _added(lines: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The readings of a tensor's ranges, added up."""
    each = [{name: Sum(torch.tensor(value)) for name, value in line["readings"].items()} for line in lines]
    return {name: one.value for name, one in joined(each).items()}


def _entry(task: Task, action: str, found: dict[str, torch.Tensor]) -> dict[str, Any]:
    kept = found.get("kept")
    return {
        "name": task.name,
        "shape": list(task.shape),
        "layer": None if (parts := split(task.name)) is None else parts[1],
        "kind": kind(task.name),
        "action": ACTIONS[action],
        "numel": task.numel,
        **reading({name: value.tolist() for name, value in found.items()}, task.numel, task.base is not None),
        "kept": None if kept is None else [float(one) / task.numel for one in kept.reshape(-1).tolist()],
    }


def _totals(found: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A method's own readings, added up over the model."""
    own = [{name: Sum(value) for name, value in one.items() if name not in OBSERVED} for one in found]
    return {name: one.value.tolist() for name, one in joined([one for one in own if one]).items()}
