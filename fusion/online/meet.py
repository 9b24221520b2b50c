"""What two networks that train apart do when they meet: how often, by which method, by which shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion.online.live import admitted


@dataclass(frozen=True)
class MergeWith:
    """Every so many optimizer steps the network in training becomes method([network, other]).

    weight: the other's share, the network's being 1 - weight; left out, both count alike. based: the method gets a
    base. params: further parameters of the method. groups: instead of the network and another one, so many in training
    meet, and all of them become the same.
    """

    every: int
    method: str = "linear"
    weight: float | None = None
    based: bool = False
    seed: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    groups: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; networks meet every 1, 2, ... steps")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; it is the share of the other model, from 0 to 1")
        if self.groups is not None and self.groups < 2:
            raise ValueError(f"groups is {self.groups}; two or more networks can meet")
        if self.groups is not None and self.weight is not None:
            raise ValueError(f"weight is {self.weight}; groups all count alike, leave it out")
        admitted(self.method, self.params, self.groups or 2, based=self.based, weighted=self.weight is not None)

    @property
    def weights(self) -> tuple[float, float] | None:
        """Of the network and of the other."""
        return None if self.weight is None else (1 - self.weight, self.weight)

    def check_steps(self, steps: int) -> None:
        """ValueError when training ends before they ever meet."""
        if 0 < steps < self.every:
            raise ValueError(f"every is {self.every} and training has {steps} steps: nothing would ever be merged")
