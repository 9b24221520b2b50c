"""The weights whose outputs are nearest those of all networks, layer by layer, in closed form.

The second step of PLeaS (Nasery et al. 2024, arXiv:2407.02447), there some hundred steps of Adam, is a least-squares
problem for each layer: its normal equations are streamed and solved by Cholesky, with a ridge towards the aligned
average. With each network's own inputs it is RegMean (Jin et al. 2022, arXiv:2212.09849).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alignment._evaluation import evaluating
from alignment.repair import layers, reset_statistics, run
from alignment.spaces import Spaces
from alignment.zip import placed

__all__ = ["Normal", "least_squares"]


@dataclass
class Normal:
    """Normal equations of Y = X W^T, summed over samples; memory does not grow with them."""

    gram: Tensor  # (inputs, inputs) float64
    right: Tensor  # (outputs, inputs) float64
    count: int = 0

    @staticmethod
    def empty(inputs: int, outputs: int) -> Normal:
        return Normal(torch.zeros(inputs, inputs).double(), torch.zeros(outputs, inputs).double())

    def update(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:  # (samples, inputs), (samples, outputs)
        """More samples; ValueError where one is not finite."""
        x, y = x.double(), y.double()
        if not bool(torch.isfinite(x.sum()) & torch.isfinite(y.sum())):
            raise ValueError("an input or output of a layer is not finite")
        self.gram += weight * (x.mT @ x).to(self.gram.device)
        self.right += weight * (y.mT @ x).to(self.gram.device)
        self.count += len(x)

    def solve(self, start: Tensor, ridge: float) -> Tensor:  # (outputs, inputs)
        """(outputs, inputs): least |X W^T - Y|^2 + ridge * |(W - start) D^1/2|^2, D the diagonal of X^T X.

        Inputs that are always zero keep `start`. Raises ValueError for a ridge below 0, one too small for inputs
        that depend on each other and, without one, where there are fewer samples than inputs.
        """
        if ridge < 0:
            raise ValueError(f"the ridge must not be negative; given: {ridge}")
        if not ridge and self.count < len(self.gram):
            raise ValueError(
                f"{self.count} samples do not determine a layer of {len(self.gram)} inputs: give more, or a ridge"
            )
        diagonal = self.gram.diagonal()
        live = diagonal > 1e-12 * diagonal.max()
        out = start.double().clone()
        scale = torch.where(live, diagonal, 1).rsqrt()[live]  # so that the diagonal is one
        matrix = self.gram[live][:, live] * scale[:, None] * scale
        own = torch.diag(torch.full_like(scale, max(ridge, 1e-12)))
        residual = self.right[:, live] - out[:, live] @ self.gram[live][:, live]
        factor, failed = torch.linalg.cholesky_ex(matrix + own)
        if bool(failed):
            raise ValueError(
                "the inputs of a layer depend on each other (those after a LayerNorm may sum to nothing), and a larger "
                f"ridge is needed; given: {ridge}"
            )
        out[:, live] += torch.cholesky_solve((residual * scale).mT, factor).mT * scale
        return out


def least_squares(
    module: nn.Module,
    networks: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    inputs: str = "merged",
    ridge: float = 0.01,
    spaces: Spaces | None = None,
    groups: Mapping[str, Tensor] | None = None,  # by space int64 (k n): the merged unit of each network's units
) -> list[str]:
    """The merged `module`'s linear layers and convolutions solved in the order they run, in place.

    `module` holds the aligned average, `networks` the tensors of the aligned networks, all in the same units. Targets
    are the weighted means of the networks' own outputs of a layer; its inputs are those of the `merged` prefix, solved
    already, the `mean` of the networks' (PLeaS), or each network's `own`, with its own outputs (RegMean). Statistics of
    BatchNorm are reset on the way. A larger `ridge` keeps weights nearer the average. Returns the layers that keep
    their average: convolutions with groups, and those whose weights are used more than once. Raises ValueError for
    other words.

    With `groups` (and the `spaces` that they are of) the module has other units than the networks, as
    `alignment.apart.partly` makes it: targets of a merged unit are the mean of its units' outputs.
    """
    if inputs not in ("merged", "mean", "own"):
        raise ValueError(f"least squares: inputs are 'merged', 'mean' or 'own'; given: '{inputs}'")
    weights = [1 / len(networks)] * len(networks) if weights is None else weights
    if len(weights) != len(networks) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"least squares: {len(networks)} networks need as many weights that sum to 1: {weights}")
    if not batches:
        raise ValueError("least squares: no samples")
    if groups and inputs == "own":
        raise ValueError("least squares: units that others keep apart have no part in a network's own inputs")
    places = _places(spaces, groups, weights) if spaces is not None and groups else {}
    merged = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    norms = any(isinstance(one, _BatchNorm) for one in module.modules())
    order, skipped = _order(module, batches[0])
    for name in order:
        if norms and inputs == "merged":
            module.load_state_dict(merged)
            reset_statistics(module, batches)
            merged = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
        merged.update(_solved(module, name, merged, networks, batches, weights, inputs, ridge, places))
    module.load_state_dict(merged)
    if norms:
        reset_statistics(module, batches)
    return skipped


def _order(module: nn.Module, batch: Any) -> tuple[list[str], list[str]]:
    """Layers in the order they run, and those that are left as they are."""
    called: list[str] = []
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in layers(module)
    ]
    try:
        with evaluating(module):
            run(module, [batch])
    finally:
        for hook in hooks:
            hook.remove()
    skipped, weights = [], [id(module.get_submodule(name).weight) for name in called]
    for name in dict.fromkeys(called):
        layer = module.get_submodule(name)
        plain = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
        grouped = isinstance(layer, nn.Conv1d | nn.Conv2d) and (layer.groups > 1 or layer.padding_mode != "zeros")
        if not plain or grouped or weights.count(id(layer.weight)) > 1:
            skipped.append(name)
    return [name for name in dict.fromkeys(called) if name not in skipped], skipped


Places = Mapping[tuple[str, str], list[Tensor]]  # (weight, "r" or "w") -> for each network (merged, n)


def _places(spaces: Spaces, groups: Mapping[str, Tensor], weights: Sequence[float]) -> dict[tuple[str, str], Any]:
    """Where each network's units go in what a layer reads and writes."""
    found = {}
    for name, unit in groups.items():
        size = spaces.by_name[name].size
        rows = placed(unit, size, int(unit.max()) + 1, torch.tensor(list(weights), dtype=torch.float64))
        for part, number in spaces.uses[name]:
            found[part.names[0], "r" if part.axes[number].role == "r" else "w"] = rows
    return found


def _solved(
    module: nn.Module,
    name: str,
    merged: Mapping[str, Tensor],
    networks: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Any],
    weights: Sequence[float],
    inputs: str,
    ridge: float,
    places: Places,
) -> dict[str, Tensor]:
    """The new weight and bias of one layer."""
    layer = module.get_submodule(name)
    weight, bias = merged[f"{name}.weight"], merged.get(f"{name}.bias")
    start = weight.flatten(1).double()
    start = start if bias is None else torch.cat([start, bias.double()[:, None]], 1)
    normal = Normal.empty(start.shape[1], len(start))
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(
        lambda one, args, out: seen.append((_rows(one, args[0].detach(), bias is not None), _outputs(one, out)))
    )
    ways, ones = [places.get((f"{name}.weight", role)) for role in ("r", "w")], (int(bias is not None), 0)
    try:
        with evaluating(module):
            for batch in batches:
                seen.clear()
                for tensors in [*networks, merged] if inputs == "merged" else networks:
                    run(module, [batch], tensors)
                if inputs == "own":
                    for share, (x, y) in zip(weights, seen):
                        normal.update(x, y, share)
                    continue
                own = seen[: len(networks)]
                xs, ys = ([_placed(pair[n], ways[n], k, ones[n]) for k, pair in enumerate(own)] for n in (0, 1))
                mean = seen[-1][0] if inputs == "merged" else _mean(xs, weights)
                normal.update(mean, _mean(ys, weights))
    finally:
        hook.remove()
    found = normal.solve(start, ridge)
    out = {f"{name}.weight": found[:, : start.shape[1] - (bias is not None)].reshape(weight.shape).to(weight)}
    if bias is not None:
        out[f"{name}.bias"] = found[:, -1].to(bias)
    return out


def _placed(x: Tensor, rows: list[Tensor] | None, network: int, ones: int) -> Tensor:  # (samples, n * inner + ones)
    """One network's units in the merged ones, `inner` numbers each, and what a bias is multiplied with."""
    if rows is None:
        return x
    place = rows[network].to(x)
    stop = x.shape[1] - ones
    units = x[:, :stop].reshape(len(x), place.shape[1], -1)
    moved = units.mT.flatten(0, 1) @ place.mT  # as one product
    return torch.cat([moved.view(len(x), -1, len(place)).mT.flatten(1), x[:, stop:]], 1)


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([share * one for share, one in zip(weights, values)]).sum(0)


def _rows(layer: nn.Module, x: Tensor, bias: bool) -> Tensor:
    """(samples, inputs): what a layer multiplies its weights with; a one for its bias."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        padding: Any = layer.padding
        if padding == "same":
            whole = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation)]
            x = nn.functional.pad(x, [side for total in reversed(whole) for side in (total // 2, total - total // 2)])
        padding = (0,) * len(layer.kernel_size) if isinstance(padding, str) else padding
        own: list[Any] = [layer.kernel_size, layer.dilation, padding, layer.stride]
        if isinstance(layer, nn.Conv1d):  # a picture of one row
            x, own = x.unsqueeze(2), [(first, *one) for first, one in zip((1, 1, 0, 1), own)]
        x = nn.functional.unfold(x, *own).transpose(1, 2)
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x


def _outputs(layer: nn.Module, out: Tensor) -> Tensor:
    out = out.detach()
    out = out if isinstance(layer, nn.Linear) else out.flatten(2).transpose(1, 2)
    return out.reshape(-1, out.shape[-1])
