"""Whether a table of spaces is right: random elements of every group are applied and outputs compared.

A derived table that passes is one whose maps leave the function alone; a written one that does not is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alignment.maps import Maps
from alignment.spaces import Spaces

__all__ = ["double", "errors", "verify"]


def errors(
    outputs: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor], spaces: Spaces, seed: int = 0
) -> dict[str, float]:
    """By space, and under `all` for all at once: how far a random map moves outputs, relative to the largest."""
    reference = outputs(tensors)
    size = float(reference.abs().max())
    drawn = spaces.random_symmetry(seed)
    found = {}
    for name, map in drawn.maps.items():
        moved = outputs(Maps(spaces, spaces, {name: map}).carry(tensors))
        found[name] = float((moved - reference).abs().max()) / size
    found["all"] = float((outputs(drawn.carry(tensors)) - reference).abs().max()) / size
    return found


def verify(
    outputs: Callable[[Mapping[str, Tensor]], Tensor],
    tensors: Mapping[str, Tensor],
    spaces: Spaces,
    *,
    tolerance: float = 1e-9,
    seeds: int = 2,
) -> None:
    """ValueError, naming the spaces, where a random element of a group moves the outputs of these float64 tensors."""
    low = sorted(
        name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype != torch.float64
    )
    if low:
        raise ValueError(f"symmetries are verified in float64, and {low[0]} is {tensors[low[0]].dtype}")
    for seed in range(seeds):
        with double():
            found = errors(outputs, tensors, spaces, seed)
        wrong = {name: error for name, error in found.items() if not error <= tolerance}
        if wrong:
            worst = ", ".join(
                f"{name} ({error:.2g})" for name, error in sorted(wrong.items(), key=lambda item: -item[1])[:4]
            )
            raise ValueError(f"no symmetry of this {spaces.family} network, by how far its outputs move: {worst}")


@contextmanager
def double() -> Iterator[None]:
    """Within it, a float64 tensor stays one where a module asks for float32 (norms and softmaxes of many models do)."""
    with _Double():
        yield


class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if func is Tensor.float:
                return first
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
