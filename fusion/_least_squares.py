"""The work of the step `least_squares`: one normal equation for all layers that read the same, block by block.

A network's layer says Y_k = X_k W_k^T, so the right side of the normal equations needs only X_k^T X, and layers with
one input share all sums. X are the merged network's inputs, whose earlier layers are solved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion._expert_squares import experts, solve_experts
from fusion._together import Together, flow, flows, reader_of

if TYPE_CHECKING:
    from alignment.spaces import Spaces
    from fusion._blocks import Flow
    from fusion.job import Job

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # what configurations call the width of an MLP


def solved(
    job: Job,
    networks: Together,
    data: str,
    shares: Sequence[float],
    width: float,
    ridge: float,
    inputs: str,
    tokens: int,
    length: int,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The merged network's tensors in the names of the first one's file, its configuration, and what was done."""
    from alignment import find_family
    from alignment.zip import joined, placed

    batches, running = flows(job, networks, data, tokens, length)
    config, wide, groups, apart = networks.config, networks.spaces, {}, 0
    if width > 1:
        config, apart = widened(networks.config, networks.spaces, networks.units, width, len(shares), job.place)
        wide = find_family(config, frozenset(networks.source.entries))
        groups = kept_apart(job, networks, running, apart)
    average = joined(networks.spaces, networks.tensors, groups, weights=shares, into=wide)
    merged = flow(job, config, average, batches)
    weights = torch.tensor(shares, dtype=torch.float64)
    places = {
        name: placed(unit, networks.spaces.by_name[name].size, wide.by_name[name].size, weights)
        for name, unit in groups.items()
    }
    moved, few = solve(Problem(job, weights, inputs, ridge, places), merged, running)
    state = merged.module.state_dict()
    for key, part in wide.by_key.items():
        own = merged.spaces.by_key[key]
        if own.names[0].rpartition(".")[0] in moved:
            part.write(own.read(state).to(average[part.names[0]]), average)
    layers = [name for name in linear(merged.module) if name not in moved]
    report = {
        "tokens": sum(one["input_ids"].numel() for one in batches),
        "units_apart": apart,
        "moved": moved,
        "averaged": layers,
        "too_few_tokens": few,
    }
    return average, config, report


def widened(
    config: Mapping[str, Any], table: Spaces, units: Sequence[str], width: float, models: int, place: str
) -> tuple[dict[str, Any], int]:
    """The configuration with `width` times the units in every MLP, and how many of each network's are kept apart.

    Raises ValueError where a family's configuration has no such width.
    """
    from alignment import find_family

    size = table.by_name[units[0]].size
    apart = round((width - 1) * size / (models - 1))
    wide = size + apart * (models - 1)
    for name in WIDTHS:
        made = {**config, name: wide}
        if all(find_family(made).by_name[unit].size == wide for unit in units):
            return made, apart
    raise ValueError(
        f"{place}.width: the configuration of a {table.family} network has no width of its MLPs; leave it 1"
    )


def kept_apart(job: Job, networks: Together, running: Sequence[Flow], apart: int) -> dict[str, Tensor]:
    """By space the merged unit (k n) of all networks' units: those that differ most on data are kept apart."""
    from alignment.apart import keep_apart, likeness
    from alignment.features.activations import Moments

    groups: dict[str, Tensor] = {}
    for layer in job.progress(range(len(running[0].blocks)), f"{job.name}: units compared"):
        for name in networks.units:
            if name.startswith(f"layers.{layer}."):
                reader = reader_of(running[0], name)
                moments = [Moments(name=f"what {reader} reads") for _ in running[1:]]
                for number in range(len(running[0].batches)):
                    first, *others = [one.inputs(number, [reader])[reader] for one in running]
                    for held, other in zip(moments, others):
                        held.update(first, other)
                groups[name] = keep_apart(likeness(moments), apart, len(running))
        for one in running:
            one.advance()
    for one in running:
        one.restart()
    return groups


@dataclass
class Sums:
    """Of layers that read the same: X^T X, and X_k^T X of each network."""

    gram: Tensor  # (m, m) float64
    cross: list[Tensor]  # (n, m) float64
    count: int = 0

    def update(self, x: Tensor | None, own: Sequence[Tensor], weights: Tensor) -> None:
        """More rows of X and of each X_k; without X each network answers on its own, and their sums are weighed."""
        grams = [one.mT @ (one if x is None else x) for one in own]
        for held, gram in zip(self.cross, grams):
            held += gram
        self.gram += x.mT @ x if x is not None else torch.einsum("k,kij->ij", weights.to(grams[0]), torch.stack(grams))
        self.count += len(own[0])


@dataclass(frozen=True)
class Problem:
    """What is solved: weights of the networks (k), whose inputs count, and where units of widened spaces go."""

    job: Job
    weights: Tensor
    inputs: str
    ridge: float
    places: Mapping[str, list[Tensor]]  # space -> for each network (wide, n)


def solve(
    problem: Problem, merged: Flow, running: Sequence[Flow]
) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """The merged network's linear layers and experts solved in place, in the order they run; by layer how far its
    weights moved, relative to the average's, and the experts that too few tokens reach. Layers that run more than once
    or share their weights with embeddings are not touched."""
    moved: dict[str, float] = {}
    few: dict[str, dict[str, int]] = {}
    for _ in problem.job.progress(range(len(merged.blocks) + 1), f"{problem.job.name}: blocks"):
        for stage in stages(merged):
            sums = _sums(problem, merged, running, stage)
            for name in stage:
                moved[name] = _solve_layer(problem, name, sums, merged, running)
        if merged.name:
            for name in experts(merged.block):  # they come last in a block
                moved[merged.name + name], found = solve_experts(problem, merged, running, merged.name + name)
                few |= found
            for one in (merged, *running):
                one.advance()
    return moved, few


def stages(flow: Flow) -> list[list[str]]:
    """Names of a block's linear layers in the order they run, those together that read the same tensor."""
    found: list[tuple[str, Any]] = []
    inside = [name for name in linear(flow.module) if name.startswith(flow.name)]
    if not flow.name:  # what is outside of the blocks and runs after them
        inside = [name for name in inside if not name.startswith(tuple(f"{block}." for block in flow.blocks))]
    last = flow.module.get_submodule(flow.blocks[-1]) if not flow.name else None
    hooks = [
        flow.module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.append((name, args[0]))
        )
        for name in inside
    ]
    if last is not None:
        hooks.append(last.register_forward_hook(lambda *_: found.clear()))
    with torch.no_grad():
        flow.block(**flow.given(0))
    for hook in hooks:
        hook.remove()
    weights = [one.weight for one in flow.module.modules() if isinstance(one, nn.Linear | nn.Embedding)]
    order: list[tuple[Any, list[str]]] = []
    for name, x in found:
        layer = flow.module.get_submodule(name)
        if sum(one is layer.weight for one in weights) > 1 or [one for one, _ in found].count(name) > 1:
            continue
        key = (id(x), layer.bias is None)
        if order and order[-1][0] == key:
            order[-1][1].append(name)
        else:
            order.append((key, [name]))
    return [names for _, names in order]


def linear(module: nn.Module) -> list[str]:
    """Names of linear layers, GPT-2's transposed ones too."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, one in module.named_modules() if isinstance(one, nn.Linear | Conv1D)]


def _sums(problem: Problem, merged: Flow, running: Sequence[Flow], stage: Sequence[str]) -> Sums:
    """The sums of a stage over all batches, with a one for the bias."""
    name = stage[0]
    biased = merged.module.get_submodule(name).bias is not None
    place = next((places for space, places in problem.places.items() if _reads(merged.spaces, space, name)), None)
    wide = _matrix(merged.module.get_submodule(name)).shape[1]
    narrow = [_matrix(one.module.get_submodule(name)).shape[1] for one in running]
    empty = partial(torch.zeros, dtype=torch.float64, device=problem.job.device)
    found = Sums(empty(wide, wide), [empty(size, wide) for size in narrow])
    for number in range(len(merged.batches)):
        own = [_with_one(one.inputs(number, [name])[name], biased) for one in running]
        x = None
        if problem.inputs == "merged":
            x = _with_one(merged.inputs(number, [name])[name], biased)
        elif problem.inputs == "mean":
            shares = own if place is None else [_placed(x_k, rows) for x_k, rows in zip(own, place)]
            x = torch.einsum("k,kij->ij", problem.weights.to(own[0]), torch.stack(shares))
        found.update(x, own, problem.weights)
    if not bool(torch.isfinite(found.gram.sum())) or not all(bool(torch.isfinite(one.sum())) for one in found.cross):
        raise ValueError(f"{problem.job.place}: what {name} reads is not finite")
    if found.count < wide:
        raise ValueError(
            f"{problem.job.place}.data: {found.count} tokens do not determine {name}, which has {wide} inputs; give at "
            "least as many (tokens says how many are read)"
        )
    return found


def _with_one(x: Tensor, biased: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1) if biased else x


def _placed(x: Tensor, place: Tensor) -> Tensor:
    """Rows of a network's units in those of the merged one; what is left (a one for the bias) stays."""
    return torch.cat([x[:, : place.shape[1]] @ place.mT.to(x), x[:, place.shape[1] :]], 1)


def _reads(spaces: Spaces, space: str, layer: str, role: str = "r") -> bool:
    return any(
        part.names[0] == f"{layer}.weight" and part.axes[number].role in role for part, number in spaces.uses[space]
    )


def _solve_layer(problem: Problem, name: str, sums: Sums, merged: Flow, running: Sequence[Flow]) -> float:
    from alignment.least_squares import Normal

    assert sums.gram is not None
    start = _matrix(merged.module.get_submodule(name))
    place = next((places for space, places in problem.places.items() if _reads(merged.spaces, space, name, "we")), None)
    right = torch.zeros_like(start)
    for number, one in enumerate(running):
        y = _matrix(one.module.get_submodule(name)) @ sums.cross[number]  # (outputs, inputs)
        if place is not None:
            rows = place[number].to(y)
            y = (rows @ y.view(-1, rows.shape[1], y.shape[1])).flatten(0, 1)  # gate and up may be one tensor
        right += float(problem.weights[number]) * y
    found = Normal(sums.gram, right, sums.count).solve(start, problem.ridge)
    layer = merged.module.get_submodule(name)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(found[:, -1])
        weight = found[:, : found.shape[1] - (layer.bias is not None)]
        layer.weight.copy_(weight if isinstance(layer, nn.Linear) else weight.mT)
    return float((found - start).norm() / start.norm().clamp_min(1e-300))


def _matrix(layer: Any) -> Tensor:
    """(outputs, inputs) float64, the bias as one more input."""
    weight = layer.weight.detach().double()
    weight = weight if isinstance(layer, nn.Linear) else weight.mT
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach().double()[:, None]], 1)
