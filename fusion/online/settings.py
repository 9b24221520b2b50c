"""A task vector joins every optimizer step: OnDARE, OnTIES and any other element method, around any torch optimizer.

Online merging optimizers (Lu et al. 2024, arXiv:2405.17931): with D the update an optimizer made and T the task vector
(reference - base), the step becomes old + merge([D, T], weights [1 - alpha, alpha]). Hooks before and after the step
take the update back and put the merged one in its place, so nothing of the optimizer is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fusion import words
from fusion._method import Method
from fusion._say import nearest

if TYPE_CHECKING:
    from fusion.online.attach import Handle

# What the two published descriptions of one method set (the paper's equations, the authors' code).
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "ties": {"elect": "weighted", "combine": "sum", "normalize": False},
        "dare": {"rescale": "none"},
        "linear": {"normalize": False},
    },
    "code": {
        "ties": {"elect": "unweighted", "combine": "sum", "normalize": False},
        "dare": {"rescale": "inverse"},
        "linear": {"normalize": False},
    },
}


class Readable(Protocol):
    """A task vector that is read where it is needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int, weights: Tensor) -> Tensor:
        """(stop - start,) elements of it, row by row; `weights` are the model's own there, when it is read."""
        ...


@dataclass(frozen=True)
class OnlineMerge:
    """What is merged into every optimizer step, or with `every` into the sum of that many.

    density: share of entries kept of update and task vector, for methods that have one. semantics: the paper's
    equations, or what the authors' code does (sign of the unweighted sum; kept entries divided by the density; the task
    vector's random mask drawn once, its entries bounded by 1). params: further parameters of the method. pinned: task
    vectors wait in pinned memory of the host, from which a merge copies chunks while it computes; where weights are on
    the CPU there is nothing to pin.
    """

    method: str = "ties"
    alpha: float = 1e-6
    density: float | None = None
    every: int = 1
    semantics: Literal["paper", "code"] = "paper"
    seed: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    pinned: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it is the share of the task vector, from 0 to 1")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; merging happens every 1, 2, ... steps")
        if self.semantics not in PRESETS:
            raise ValueError(
                f"semantics is '{self.semantics}'; allowed are paper, code{nearest(self.semantics, PRESETS)}"
            )
        self.checked()

    def checked(self) -> tuple[Method, dict[str, Any]]:
        """The method and its parameters; ValueError for what it can't take."""
        method = Method.of(self.method)
        given = {**PRESETS[self.semantics].get(self.method, {}), **self.params}
        if "density" in method.parameters:
            given.setdefault("density", 1.0 if self.density is None else self.density)
        elif self.density is not None:
            raise ValueError(f"{self.method} has no density; leave it out")
        fitted = method.check(given, 2, base=True, weights="weights" in method.needs, live=True)
        if "weights" not in method.needs:
            raise ValueError(f"{self.method} takes no weights, and online merging gives 1 - alpha and alpha")
        if method.scope(fitted) == "model":
            raise ValueError(f"{self.method}: scope is model; steps merge tensor by tensor")
        return method, fitted

    @property
    def idle(self) -> bool:
        """Whether the merged step is the optimizer's own, bit by bit."""
        _, params = self.checked()
        neutral = params.get("density", 1.0) == 1.0 and params.get("scale", 1.0) == 1.0
        plain = self.method in ("dare", "linear") or (self.method == "ties" and params.get("elect") == "weighted")
        return self.alpha == 0 and neutral and plain

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        task_vectors: Mapping[str, Tensor | Readable],
    ) -> Handle:
        """Hooks on the optimizer, which stay until `detach()`.

        task_vectors: reference - base by parameter name, each of the unsharded parameter's shape; all trained
        parameters need one. Raises ValueError for names or shapes that do not match, for task vectors that are all
        zero, for an unknown layout and for weights too coarse to merge into.
        """
        from fusion.online.attach import Handle

        return Handle(self, optimizer, list(named_parameters), task_vectors)


@dataclass(frozen=True)
class Extras:
    """What the callback does besides: `lines` scales the task vector layer by layer, {alpha, beta, outside} as the post
    word of that name; `ema` leaves a moving average of the policy with this decay; `towards_init` leaves this share of
    the way back to the weights that training began with (both in the last step)."""

    lines: Mapping[str, Any] | None = None
    ema: float | None = None
    towards_init: float | None = None

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it is the decay of a moving average, between 0 and 1")
        if self.towards_init is not None and not 0 <= self.towards_init <= 1:
            raise ValueError(f"towards_init is {self.towards_init}; it is a share of the way back, from 0 to 1")
        if self.lines is not None:
            words.check("post", "lines", self.lines, "lines")


def refuse_below_adapter(merge: OnlineMerge, extras: Extras) -> None:
    """ValueError for settings that a fresh adapter over the reference can't be merged by."""
    if merge.every == 1:
        raise ValueError(
            "every is 1, and one step of a fresh adapter is no update of the weights below it: its factor B is 0, so A "
            "can't move yet, and the product changes in directions drawn at random; with every: 2 or more (say, 16) "
            "what the factors' product changes in that many steps is merged into those weights"
        )
    if extras.ema is not None or extras.towards_init:
        raise ValueError(
            "ema and towards_init are for a whole model's weights; leave them out where an adapter is trained"
        )
