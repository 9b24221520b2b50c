"""A unit is what it does on data: streamed moments of two networks' activations on the same samples.

Activation matching as in Li et al. 2016 (arXiv:1511.07543) and Ainsworth et al. 2022 (arXiv:2209.04836), at what reads
a space, so after its non-linearity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment._evaluation import evaluating
from alignment.spaces import Spaces

__all__ = ["Moments", "Pair", "activations", "collect", "streamed", "taps"]

DEAD = 1e-6  # of the largest standard deviation: a unit that varies less tells nothing


@dataclass
class Moments:
    """Sums over samples of two sets of units, shifted by the first samples' means; memory does not grow with them."""

    count: int = 0
    shift: tuple[Tensor, ...] = ()
    sums: list[Tensor] = field(default_factory=list)  # (n,) and (m,) float64
    squares: list[Tensor] = field(default_factory=list)
    cross: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n, m) float64
    name: str = "an activation"  # for sentences

    def update(self, target: Tensor, donor: Tensor) -> None:  # (samples, n), (samples, m)
        """More samples, row by row the same ones; ValueError where they are not as many, or not finite."""
        if len(target) != len(donor):
            raise ValueError(f"target has {len(target)} samples and donor {len(donor)}: they must be the same ones")
        if not len(target):
            return
        both = [x.detach().float() if x.dtype != torch.float64 else x.detach() for x in (target, donor)]
        if not self.count:
            self.shift = tuple(x.mean(0) for x in both)
            self.sums = [torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for x in both]
            self.squares = [one.clone() for one in self.sums]
            shape = (both[0].shape[1], both[1].shape[1])
            self.cross = torch.zeros(shape, dtype=torch.float64, device=both[0].device)
        moved = [x - shift for x, shift in zip(both, self.shift)]
        for number, x in enumerate(moved):
            squares = x.square().sum(0, dtype=torch.float64)
            if not bool(torch.isfinite(squares.sum())):
                raise ValueError(
                    f"{self.name} is not finite in the {('target', 'donor')[number]}, or its square is not"
                )
            self.sums[number] += x.sum(0, dtype=torch.float64)
            self.squares[number] += squares
        self.cross += moved[0].mT @ moved[1]
        self.count += len(target)

    @property
    def means(self) -> list[Tensor]:
        """(n,) and (m,) means."""
        return [shift.double() + total / self.count for shift, total in zip(self.shift, self.sums)]

    @property
    def variances(self) -> list[Tensor]:
        """(n,) and (m,) variances, over the number of samples."""
        found = [square / self.count - (s / self.count).square() for s, square in zip(self.sums, self.squares)]
        return [one.clamp_min(0) for one in found]

    @property
    def dead(self) -> list[Tensor]:
        """(n,) and (m,) bool: units that hardly vary."""
        deviations = [variance.sqrt() for variance in self.variances]
        return [one <= DEAD * one.max() for one in deviations]

    @property
    def covariance(self) -> Tensor:
        """(n, m) covariances."""
        return self.cross / self.count - torch.outer(*(total / self.count for total in self.sums))


def activations(moments: Moments, *, kind: Literal["correlation", "product"] = "correlation") -> Tensor:
    """(n, m) similarities: correlations, 0 for dead units, or `product`s, means of a b^T over both's root mean squares.

    Raises ValueError for fewer than two samples.
    """
    if moments.count < 2:
        raise ValueError(f"correlations need two samples or more; given: {moments.count}")
    if kind == "correlation":
        deviations = [variance.sqrt().masked_fill(dead, 0) for variance, dead in zip(moments.variances, moments.dead)]
        table = moments.covariance
    elif kind == "product":
        table = moments.covariance + torch.outer(*moments.means)
        pairs = zip(moments.variances, moments.means)
        deviations = [(variance + mean.square()).mean().sqrt().expand_as(mean) for variance, mean in pairs]
    else:
        raise ValueError(f"kind must be 'correlation' or 'product'; given: '{kind}'")
    factors = [torch.where(d > 0, 1 / d.clamp_min(torch.finfo(d.dtype).tiny), 0) for d in deviations]
    return table * factors[0][:, None] * factors[1]


@dataclass(frozen=True)
class Pair:
    """One batch for both networks: an input of each, and which of its positions correspond (None: all, in order).

    `target_rows`, `donor_rows` number positions as they lie in an activation without its units' axis: padding is left
    out so, and positions of other tokenizers are paired where their bytes end together.
    """

    target: Any
    donor: Any
    target_rows: Tensor | None = None
    donor_rows: Tensor | None = None


@dataclass(frozen=True)
class Tap:
    """Where a space can be seen: the input of a module, its axis of units, the stretch of it, what lies inside."""

    module: str
    start: int
    size: int
    inner: int  # numbers for each unit, one after the other (a map flattened)


def taps(module: nn.Module, spaces: Spaces) -> dict[str, dict[str, Tap]]:
    """By space within no other, and by the part that reads it, the inputs of linear layers and convolutions.

    What reads the same norm has the same input: the first such part stands for all.
    """
    again = {name for norm in spaces.norms for name, _, _ in norm.readers[1:]}
    found: dict[str, dict[str, Tap]] = {}
    for part in spaces.parts:
        name, _, last = part.names[0].rpartition(".")
        if last != "weight" or part.names[0] in again or len(part.shape) < 2:
            continue
        numbers = [number for number, axis in enumerate(part.axes) if axis.space is not None and axis.role == "r"]
        if len(numbers) != 1:
            continue
        read = part.axes[numbers[0]]
        dim = 1 if numbers[0] else 0  # a layer that stores its weight (in, out) reads on the first axis
        linear = isinstance(module.get_submodule(name), nn.Linear | _Conv)
        inside = spaces.by_name[read.space or ""].within is not None or spaces.inner(read.space or "")
        if inside or linear is not bool(dim) or part.shape[dim] % read.size:
            continue
        cuts = part.take if part.grid == part.shape else ()  # of a grid with more axes none is cut that is read
        start, length = next(((start, size) for one, start, size in cuts if one == dim), (0, part.shape[dim]))
        tap = Tap(name, start, length, length // read.size)
        if all(tap != other for other in found.get(read.space or "", {}).values()):
            found.setdefault(read.space or "", {})[part.key] = tap
    return found


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def collect(
    target: nn.Module,
    donor: nn.Module,
    target_spaces: Spaces,
    donor_spaces: Spaces,
    batches: Iterable[Any],
    *,
    kind: Literal["correlation", "product"] = "correlation",
    memory: float = math.inf,
) -> dict[str, Tensor]:
    """By space the similarities (n, m) that `align(features=...)` takes; the mean over all places where it is read.

    A batch is an input of both networks, or a `Pair`. Both run in evaluation mode, without gradients. Spaces that no
    linear layer or convolution reads alone are left out. Where sums of all places take more than `memory` bytes, the
    batches are gone through several times, so they must be there again (a list). Raises ValueError where there is no
    data.
    """
    places = streamed(target, donor, target_spaces, donor_spaces, lambda: batches, memory)
    return {
        name: mean_of(activations(one, kind=kind) for _, one in many) for name, many in groupby(places, itemgetter(0))
    }


def mean_of(tables: Iterable[Tensor]) -> Tensor:
    """The mean of tables of one shape, of which one is held beside their sum."""
    total, count = torch.zeros(()), 0
    for table in tables:
        total, count = table + total.to(table), count + 1
    return total / count


def moments(
    target: nn.Module, donor: nn.Module, target_spaces: Spaces, donor_spaces: Spaces, batches: Iterable[Any]
) -> dict[str, list[Moments]]:
    """By space the moments at each place where both networks read it."""
    found: dict[str, list[Moments]] = {}
    for name, one in streamed(target, donor, target_spaces, donor_spaces, lambda: batches):
        found.setdefault(name, []).append(one)
    return found


def streamed(
    target: nn.Module,
    donor: nn.Module,
    target_spaces: Spaces,
    donor_spaces: Spaces,
    batches: Callable[[], Iterable[Any]],
    memory: float = math.inf,
    leave: Container[str] = (),
) -> Iterator[tuple[str, Moments]]:
    """A space and the moments at one place where both networks read it, for place after place, a space's together.

    Those of as many places as fit into `memory` bytes (one at least) are summed in one pass over the batches, whatever
    that number the same bits. Spaces in `leave` are left out. Raises ValueError where there is no data.
    """
    taken = taps(target, target_spaces), taps(donor, donor_spaces)
    places = [
        (name, tap, taken[1][name][key])
        for name, own in taken[0].items()
        if name in taken[1] and name not in leave
        for key, tap in own.items()
        if key in taken[1][name]
    ]
    for window in _windows(places, memory):
        found = [Moments(name=f"what {one.module} reads") for _, one, _ in window]
        for batch in batches():
            pair = batch if isinstance(batch, Pair) else Pair(batch, batch)
            seen = [
                inputs_of(target, pair.target, {one.module for _, one, _ in window}),
                inputs_of(donor, pair.donor, {other.module for _, _, other in window}),
            ]
            for one, (_, first, second) in zip(found, window):
                x, y = _rows(target, seen[0], first), _rows(donor, seen[1], second)
                x = x if pair.target_rows is None else x[pair.target_rows.to(x.device)]
                one.update(x, y if pair.donor_rows is None else y[pair.donor_rows.to(y.device)])
        if any(one.count == 0 for one in found):
            raise ValueError("no samples: the batches are empty, or an iterator that is used up (give a list)")
        for name, _, _ in window:
            yield name, found.pop(0)


Place = tuple[str, Tap, Tap]  # a space, where the target reads it, where the donor does


def _windows(places: Sequence[Place], memory: float) -> Iterator[list[Place]]:
    """The places in their order, together those whose sums fit."""
    window: list[Place] = []
    held = 0
    for place in places:
        needed = 8 * math.prod(tap.size // tap.inner for tap in place[1:])  # float64, for each pair of units
        if window and held + needed > memory:
            yield window
            window, held = [], 0
        window, held = [*window, place], held + needed
    if window:
        yield window


def inputs_of(module: nn.Module, given: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """What goes into the modules of these names in one run on an input (a tensor, a tuple or a mapping)."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.__setitem__(name, (args or tuple(kwargs.values()))[0].detach()),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with torch.no_grad(), evaluating(module):
            if isinstance(given, Mapping):
                module(**given)
            else:
                module(*given) if isinstance(given, tuple | list) else module(given)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _rows(module: nn.Module, seen: Mapping[str, Tensor], tap: Tap) -> Tensor:
    """(samples, units) of one place."""
    x = seen[tap.module]
    if isinstance(module.get_submodule(tap.module), _Conv):
        x = x.movedim(1, -1)
    x = x.narrow(-1, tap.start, tap.size)
    return x.reshape(-1, tap.size // tap.inner, tap.inner).transpose(1, 2).reshape(-1, tap.size // tap.inner)
