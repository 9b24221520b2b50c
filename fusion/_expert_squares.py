"""Experts in the step `least_squares`: each is solved on the tokens that the merged network's router gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fusion._blocks import Flow
    from fusion._least_squares import Problem

STACKS = ("gate_up_proj", "down_proj")  # (experts, outputs, inputs), in the order in which they run


def experts(module: nn.Module) -> list[str]:
    """Names of the modules that hold the experts of a layer."""
    return [
        name
        for name, one in module.named_modules()
        if all(stack in dict(one.named_parameters(recurse=False)) for stack in STACKS)
    ]


def solve_experts(
    problem: Problem, merged: Flow, running: Sequence[Flow], name: str
) -> tuple[float, dict[str, dict[str, int]]]:
    """The experts of a layer solved in place: how far their weights moved, relative to the average's; and by matrix,
    of experts that keep the average since fewer tokens than a row has inputs reach them, how many do."""
    from alignment.least_squares import Normal

    (x, chosen), *others = [_read(one, name) for one in (merged, *running)]
    layers = [one.module.get_submodule(name) for one in (merged, *running)]
    apart, size = torch.zeros(2, dtype=torch.float64)
    few: dict[str, dict[str, int]] = {}
    for expert in range(len(layers[0].down_proj)):
        given = (chosen == expert).any(1)
        rows = [x[given], *(own[given] for own, _ in others)]
        for stack in STACKS:
            if stack == "down_proj":
                rows = [_gated(layer, expert, one) for layer, one in zip(layers, rows)]
            start, *weights = [layer.get_parameter(stack).detach()[expert] for layer in layers]
            before = start.double()
            if len(rows[0]) < start.shape[1]:
                few.setdefault(f"{name}.{stack}", {})[str(expert)] = len(rows[0])
            else:
                normal = Normal.empty(start.shape[1], len(start))
                for share, weight, own in zip(problem.weights.tolist(), weights, rows[1:]):
                    normal.update(_inputs(problem, rows, own), own @ weight.mT, share)
                start.copy_(normal.solve(before.cpu(), problem.ridge))
            apart += (start.double() - before).square().sum().cpu()
            size += before.square().sum().cpu()
    return float((apart / size.clamp_min(1e-300)).sqrt()), few


def _inputs(problem: Problem, rows: Sequence[Tensor], own: Tensor) -> Tensor:
    """What one network's outputs are answers to: its own inputs, the merged network's, or the mean of all."""
    if problem.inputs == "mean":
        return torch.einsum("k,kij->ij", problem.weights.to(own), torch.stack(list(rows[1:])))
    return own if problem.inputs == "own" else rows[0]


def _gated(layer: Any, expert: int, x: Tensor) -> Tensor:
    """(tokens, neurons) of one expert."""
    gate, up = (x @ layer.gate_up_proj.detach()[expert].mT).chunk(2, -1)
    gated: Tensor = layer.act_fn(gate) * up
    return gated


def _read(flow: Flow, name: str) -> tuple[Tensor, Tensor]:
    """(tokens, features) that the experts read, on all batches, and (tokens, chosen) which of them do."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = flow.module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append((args[0].detach(), args[1]))
    )
    with torch.no_grad():
        for number in range(len(flow.batches)):
            flow.block(**flow.given(number))
    hook.remove()
    states, chosen = zip(*seen)
    return torch.cat(states).flatten(0, -2), torch.cat(chosen).flatten(0, -2)
