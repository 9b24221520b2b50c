"""What averaging does to the statistics of units, undone (REPAIR, Jordan et al. 2022, arXiv:2211.08403).

A mean of matched units varies less than either, layer after layer. In a network with BatchNorm its statistics are taken
anew on data; in one without, each unit of a linear layer or convolution is given the mean of the endpoints' means and
deviations, written into its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["repair", "reset_statistics"]

DEAD = 1e-6  # a unit that varies less than this share of its layer keeps its weights


def reset_statistics(module: nn.Module, batches: Iterable[Any]) -> None:
    """Running means and variances of all BatchNorm layers over these batches, in place; each batch counts the same.

    Raises ValueError where there is no batch.
    """
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    training, momenta = [(one, one.training) for one in module.modules()], [one.momentum for one in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        count = run(module, batches)
    finally:
        for one, state in training:
            one.training = state
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
    for name in list(goals)[:-1]:  # in the order in which they run, each on the prefix already repaired
        layer = module.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        mean, deviation = output_moments(module, batches, [name])[name]
        live = deviation > DEAD * deviation.max()
        factor = torch.where(live, goals[name][1] / torch.where(live, deviation, 1), 1)
        with torch.no_grad():
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)).to(layer.weight))
            if isinstance(layer.bias, Tensor):
                layer.bias.copy_((factor * (layer.bias - mean) + goals[name][0]).to(layer.bias))


def layers(module: nn.Module) -> list[str]:
    """Names of linear layers and of convolutions that are not transposed."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return [name for name, one in module.named_modules() if isinstance(one, kinds)]


def output_moments(
    module: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation (units,) float64 of the outputs of linear layers and convolutions, in the order they run."""
    count: dict[str, int] = {}
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, layer: nn.Module, out: Tensor) -> None:
        rows = out.detach() if isinstance(layer, nn.Linear) else out.detach().movedim(1, -1)
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
    training = module.training
    try:
        run(module.eval(), batches)
    finally:
        module.train(training)
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
            positional = batch if isinstance(batch, tuple | list) else () if isinstance(batch, Mapping) else (batch,)
            named = dict(batch) if isinstance(batch, Mapping) else {}
            if tensors is None:
                module(*positional, **named)
            else:
                torch.func.functional_call(module, dict(tensors), tuple(positional), named)
            count += 1
    return count
