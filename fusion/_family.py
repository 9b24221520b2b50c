"""One tensor of K models in memory: checked, cut into the regions a method is called with, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusion._method import Method, Region
from fusion._say import nearest
from fusion.merge._sums import whole_rows
from fusion.merge._x import BLOCK, Outputs, Reading, Running, joined, values

CHUNK = 256 * BLOCK  # elements a call sees; any other gives the same bits
Layer = tuple[int, int] | None


@dataclass(frozen=True)
class After:
    """A post word, as it follows on one tensor, with what it reads of the base's statistics."""

    word: Method
    params: Mapping[str, Any]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """K tensors of one name with their base, and what a method may ask for about them.

    Raises ValueError, naming the tensor and whose it is, unless shapes and dtypes are one and all numbers finite.
    """

    method: Method
    name: str
    tensors: Sequence[Tensor]
    base: Tensor | None
    weights: Tensor  # (K,)
    layer: Layer = None
    inputs: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        first = self.tensors[0]
        every = [*self.tensors, *([] if self.base is None else [self.base])]
        for i, one in enumerate(every):
            whose = f"model {i}" if i < len(self.tensors) else "the base"
            if one.shape != first.shape:
                shapes = f"{tuple(one.shape)} in {whose} and {tuple(first.shape)} in model 0"
                raise ValueError(
                    f"'{self.name}' has shape {shapes}; a merge needs one shape (retokenize makes vocabularies one)"
                )
            if one.dtype != first.dtype:
                raise ValueError(
                    f"'{self.name}' is {one.dtype} in {whose} and {first.dtype} in model 0; convert one of them"
                )
            if one.is_quantized or (one.is_floating_point() and one.element_size() == 1):
                raise ValueError(
                    f"'{self.name}' of {whose} is quantised ({one.dtype}), and codes can't be averaged; dequantise it "
                    f"first"
                )
            if one.is_complex():
                raise ValueError(f"'{self.name}' holds complex numbers ({one.dtype}), which no method merges")
            if one.is_floating_point() and not bool(torch.isfinite(one).all()):
                kind = "NaN" if bool(one.isnan().any()) else "infinity"
                raise ValueError(f"'{self.name}' of {whose} has {kind} in it, and a merge would spread it")
        for statistic in self.method.inputs:
            if statistic not in self.inputs and statistic not in self.method.optional:
                raise ValueError(f"{self.method.word} reads the statistic '{statistic}' of each model; give it: inputs")
        for statistic, given in self.inputs.items():
            if statistic not in self.method.inputs:
                raise ValueError(
                    f"{self.method.word} reads no statistic '{statistic}'{nearest(statistic, self.method.inputs)}"
                )
            if len(given) != len(self.tensors):
                raise ValueError(f"inputs['{statistic}'] has {len(given)} entries for {len(self.tensors)} models")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape)

    @property
    def copied(self) -> bool:
        """Whether there is nothing to compute with: no elements, or whole numbers; ValueError where these differ."""
        first = self.tensors[0]
        if first.numel() == 0 or first.is_floating_point():
            return first.numel() == 0
        if not all(torch.equal(one, first) for one in (*self.tensors, *([] if self.base is None else [self.base]))):
            raise ValueError(
                f"'{self.name}' holds whole numbers ({first.dtype}) that differ between the models; an average of them "
                f"means nothing: leave the tensor out, or make them equal"
            )
        return True

    def equal(self, after: Sequence[After]) -> bool:
        """Whether all that the method looks at, and what follows, is one and the same tensor."""
        base = self.base if any("base" in word.needs for word in (self.method, *(one.word for one in after))) else None
        return all(torch.equal(one, self.tensors[0]) for one in (*self.tensors[1:], *([] if base is None else [base])))

    def regions(self, unit: str, stats: Mapping[str, Tensor]) -> Iterator[Region]:
        """The tensor in the pieces that a method of this unit is called with."""
        numel = self.tensors[0].numel()
        whole = Region(
            iter(()), None, self.weights, self.name, self.shape, self.layer, 0, stats, {}, self.seed, self.step
        )
        if unit == "tensor":
            base = None if self.base is None else self.base.float()
            models: Any = (one.float() for one in self.tensors)
            if not self.method.sequential:
                models = torch.stack(list(models))
            yield replace(whole, tensors=models, base=base, inputs=self._inputs(0, numel))
            return
        size = whole_rows(self.shape, CHUNK) if unit == "row" else CHUNK
        for start in range(0, numel, size):
            stop = min(start + size, numel)
            tensors = torch.stack([_flat(one, start, stop) for one in self.tensors])
            base = None if self.base is None else _flat(self.base, start, stop)
            yield replace(whole, tensors=tensors, base=base, start=start, inputs=self._inputs(start, stop))

    def _inputs(self, start: int, stop: int) -> dict[str, Any]:
        side: dict[str, Any] = {}
        for statistic, kind in self.method.inputs.items():
            given = self.inputs.get(statistic)
            if given is None or kind == "tensor":
                side[statistic] = given
                continue
            found = [one for one in given if one is not None]
            if not found and statistic in self.method.optional:
                side[statistic] = None
                continue
            for i, one in enumerate(given):
                if one is None or one.shape != self.tensors[0].shape:
                    has = "none" if one is None else f"one of shape {tuple(one.shape)}"
                    raise ValueError(
                        f"'{self.name}' of shape {self.shape} needs '{statistic}' for every entry; model {i} has {has}"
                    )
            rows = torch.stack([_flat(one, start, stop) for one in found])
            side[statistic] = rows.view(-1, *self.shape) if self.method.unit == "tensor" else rows
        return side

    def readings(self, index: int, params: Mapping[str, Any], stats: Mapping[str, Tensor]) -> dict[str, Reading]:
        """What statistics pass `index` finds in this tensor."""
        running = Running()
        for number, region in enumerate(self.regions(self.method.unit, stats)):
            running.add(number, self.method.call_pass(index, region, params))
        return running.readings()

    def merged(
        self, params: Mapping[str, Any], stats: Mapping[str, Tensor] | None = None, after: Sequence[After] = ()
    ) -> Outputs:
        """The merged tensor with its by-products; `stats` are the whole model's, where the method goes by these.

        `after` follows before anything is rounded.
        """
        method = self.method
        stays = self.copied or (self.equal(after) and not method.extras and method.equal_stays(self.weights, params))
        if self.copied or (stays and not after):
            return Outputs(self.tensors[0].clone())
        if stats is None and not stays:
            stats = {}
            for index in range(method.needed(params)):
                stats = method.settle({**stats, **values(self.readings(index, params, stats))}, params, self.weights)
        by_rows = method.unit == "element" and any(one.word.unit == "row" for one in after)
        regions = self.regions("row" if by_rows else method.unit, stats or {})
        parts = [_followed(_first(one) if stays else method.call(one, params), one, after) for one in regions]
        made = [{n: x for n, x in part.extras.items() if not isinstance(x, Tensor)} for part in parts]
        extras: dict[str, Any] = dict(joined(made))
        for name in parts[0].extras.keys() - extras.keys():
            extras[name] = torch.cat([x for part in parts if isinstance(x := part.extras[name], Tensor)], -1)
        return Outputs(self._whole([part.tensor for part in parts]), extras)

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        whole = (parts[0] if len(parts) == 1 else torch.cat(list(parts))).reshape(self.shape)
        out = whole.to(self.tensors[0].dtype)
        if not bool(torch.isfinite(out).all()):
            raise ValueError(
                f"{self.method.word} made numbers of '{self.name}' that {out.dtype} has no room for; look at weights "
                f"and scale"
            )
        return out


def _first(region: Region) -> Outputs:
    return Outputs(next(iter(region.tensors)))


def _followed(found: Outputs, region: Region, after: Sequence[After]) -> Outputs:
    out, base = found.tensor.reshape(-1), None if region.base is None else region.base.reshape(-1)
    for one in after:
        follows = replace(region, merged=out, base=base, inputs=one.inputs)
        out = one.word.call(follows, one.params).tensor.reshape(-1)
    return Outputs(out, found.extras) if after else found


def _flat(tensor: Tensor, start: int, stop: int) -> Tensor:
    """(stop - start,) float32."""
    return tensor.detach().reshape(-1)[start:stop].float()
