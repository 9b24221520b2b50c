"""What averaging does to the statistics of units, undone (REPAIR, Jordan et al. 2022, arXiv:2211.08403).

A mean of matched units varies less than either, layer after layer. In a network with BatchNorm its statistics are taken
anew on data; in one without, each unit of a linear layer or convolution is given the mean of the endpoints' means and
deviations, written into its weights. A network carried by a coupling consists of such means by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alignment._acts import Map, Matrix, Plan, act, missing
from alignment._evaluation import computed, evaluating
from alignment.maps import Maps
from alignment.spaces import Axis, Part

__all__ = ["carried", "repair", "reset_statistics", "restore"]

Goal = tuple[Tensor, Tensor]  # means (units,) and deviations (units,), or () for the root mean square of all

DEAD = 1e-6  # a unit that varies less than this share of its layer keeps its weights


def reset_statistics(module: nn.Module, batches: Iterable[Any]) -> None:
    """Running means and variances of all BatchNorm layers over these batches, in place; each batch counts the same.

    Raises ValueError where there is no batch.
    """
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    momenta = [one.momentum for one in norms]
    try:
        with evaluating(module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            count = run(module, batches)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    if not count:
        raise ValueError("no samples: the batches are empty")


def repair(
    module: nn.Module,
    endpoints: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    weights: Sequence[float] | None = None,
) -> None:
    """Every unit of the merged `module` with the weighted means of the endpoints' means and deviations, in place.

    `endpoints` are tensors of the same architecture, in the same units (carried by `Maps`). In a network with BatchNorm
    the statistics are reset. The last layer keeps its outputs' scale. `batches` are gone through once for each endpoint
    and each layer, so they must be there again (a list). Raises ValueError where they are empty or used up.
    """
    if any(isinstance(one, _BatchNorm) for one in module.modules()):
        reset_statistics(module, batches)
        return
    weights = [1 / len(endpoints)] * len(endpoints) if weights is None else weights
    if len(weights) != len(endpoints) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"repair: {len(endpoints)} endpoints need as many weights that sum to 1; given: {weights}")
    own = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    goals: dict[str, list[Tensor]] = {}
    for weight, tensors in zip(weights, endpoints):
        module.load_state_dict(dict(tensors))
        for name, (mean, deviation) in output_moments(module, batches).items():
            held = goals.setdefault(name, [torch.zeros_like(mean), torch.zeros_like(mean)])
            held[0] += weight * mean
            held[1] += weight * deviation
    module.load_state_dict(own)
    restore(module, {name: (mean, deviation) for name, (mean, deviation) in list(goals.items())[:-1]}, batches)


def restore(module: nn.Module, goals: Mapping[str, Goal], batches: Iterable[Any]) -> dict[str, float]:
    """Layers in this order, each on the prefix restored before it, with units of these means and deviations, in place;
    by layer the mean of its units' factors.

    Means move with a bias alone. A unit whose goal is not a number keeps its weights. `batches` are gone through once
    for each layer.
    """
    factors = {}
    for name, (goal, wanted) in goals.items():
        layer = module.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        mean, deviation = output_moments(module, batches, [name])[name]
        live = (deviation > DEAD * deviation.max()) & wanted.isfinite()
        spread = deviation if wanted.dim() else deviation.square().mean().sqrt()
        factor = torch.where(live, wanted / torch.where(live, spread, 1), 1)
        first = isinstance(layer, nn.Linear | _Conv)  # others store their weight (in, out)
        shape = (-1, *[1] * (layer.weight.dim() - 1)) if first else (1, -1)
        with torch.no_grad():
            layer.weight.mul_(factor.view(shape).to(layer.weight))
            if isinstance(layer.bias, Tensor):
                moved = factor * (layer.bias - mean) + goal
                layer.bias.copy_(torch.where(goal.isfinite(), moved, layer.bias).to(layer.bias))
        factors[name] = float(factor.mean())
    return factors


def carried(maps: Maps, target: nn.Module, donor: nn.Module, batches: Iterable[Any]) -> dict[str, Goal]:
    """Goals in the target's units, by its layers in the order they run: the donor's means and deviations on `batches`.

    Of layers that read or write a space whose units are means of several: those of no other map keep their statistics.
    A mean of units has the mean of their deviations; of a space that rotates only the root mean square of all is known.
    Left out are the head, and layers that a tensor holds together or whose outputs are coordinates of heads.
    """
    own, other = maps.target.of(target.state_dict()), maps.source.of(donor.state_dict())
    parts: dict[str, Part] = {}
    for part in own.parts:
        source = other.by_key.get(part.key)
        mixed = any(isinstance(maps.maps.get(axis.space or ""), Plan) for axis in part.axes)
        if mixed and source is not None and part.key not in maps.kept and _output(part) and _output(source):
            parts[source.names[0].removesuffix(".weight")] = part
    goals: dict[str, Goal] = {}
    for name, (mean, deviation) in (output_moments(donor, batches, list(parts)) if parts else {}).items():
        axis = _output(parts[name])
        assert axis is not None and axis.space is not None
        moments = _moved(maps.maps.get(axis.space), axis.role, mean, deviation)
        goals[parts[name].names[0].removesuffix(".weight")] = moments
    return goals


def _output(part: Part) -> Axis | None:
    """The axis of a linear layer's outputs, where these are the units of one space."""
    roles = [axis.role for axis in part.axes]
    if len(part.names) > 1 or part.take or part.grid != part.shape or len(roles) != 2 or roles.count("r") != 1:
        return None
    axis = part.axes[1 - roles.index("r")]
    return axis if part.names[0].endswith(".weight") and axis.space not in (None, "vocabulary") else None


def _moved(map: Map | None, role: str, mean: Tensor, deviation: Tensor) -> Goal:
    if map is None:
        return mean, deviation
    if isinstance(map, Plan):
        wanted = act(Plan(map.write.abs(), map.read, map.even), role, deviation, 0, None)
    elif isinstance(map, Matrix):
        wanted = deviation.square().mean().sqrt()
    else:
        wanted = act(map, role, deviation, 0, None).abs()
    found, none = act(map, role, mean, 0, None), missing(map)
    return (found, wanted) if none is None else (found.masked_fill(none, math.nan), wanted.masked_fill(none, math.nan))


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def layers(module: nn.Module) -> list[str]:
    """Names of linear layers and of convolutions that are not transposed."""
    return [name for name, one in module.named_modules() if isinstance(one, nn.Linear | _Conv)]


def output_moments(
    module: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation (units,) float64 of the outputs of linear layers and convolutions, in the order they run."""
    count: dict[str, int] = {}
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, layer: nn.Module, out: Tensor) -> None:
        rows = out.detach().movedim(1, -1) if isinstance(layer, _Conv) else out.detach()
        rows = rows.reshape(-1, rows.shape[-1]).double()
        if name not in sums:
            count[name] = 0
            sums[name] = [rows.mean(0), torch.zeros_like(rows[0]), torch.zeros_like(rows[0])]
        held = sums[name]
        moved = rows - held[0]
        count[name] += len(rows)
        held[1] += moved.sum(0)
        held[2] += moved.square().sum(0)

    hooks = [
        module.get_submodule(name).register_forward_hook(lambda layer, _, out, name=name: see(name, layer, out))
        for name in (layers(module) if names is None else names)
    ]
    try:
        with evaluating(module):
            run(module, batches)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("no samples: the batches are empty, or an iterator that is used up (give a list)")
    found = {}
    for name, (shift, total, squares) in sums.items():
        mean = total / count[name]
        found[name] = (shift + mean, (squares / count[name] - mean.square()).clamp_min(0).sqrt())
    return found


def run(module: nn.Module, batches: Iterable[Any], tensors: Mapping[str, Tensor] | None = None) -> int:
    """How many batches the module was run on, without gradients; with these tensors in the place of its own."""
    count = 0
    with torch.no_grad():
        for batch in batches:
            positional = (
                tuple(batch) if isinstance(batch, tuple | list) else () if isinstance(batch, Mapping) else (batch,)
            )
            named = dict(batch) if isinstance(batch, Mapping) else {}
            module(*positional, **named) if tensors is None else computed(module, tensors, positional, named)
            count += 1
    return count
