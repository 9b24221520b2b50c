"""What takes the weights' place in the last step: a moving average of the policy, or a point on its way back (WARP,
Ramé et al. 2024, arXiv:2406.16768)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion.checkpoint import Source
from fusion.online.layouts import Layout
from fusion.online.settings import Extras
from fusion.online.vectors import checked_region


class Final:
    """A hook that follows online merging's: it works on shards, before DeepSpeed hands them to the model."""

    def __init__(self, layout: Layout, optimizer: torch.optim.Optimizer, extras: Extras, start: Source | None) -> None:
        self.layout, self.extras, self.start = layout, extras, start
        self.last = self.done = False  # the step at hand is the last one; it was made
        self.averages: dict[str, list[Tensor]] = {}  # key -> its pieces' moving averages, from the weights as they are
        if extras.ema is not None:
            self.averages = {key: [p.flat.detach().clone() for p in pieces] for key, pieces in layout.held.values()}
        self._hook = optimizer.register_step_post_hook(self._after)

    def detach(self) -> None:
        """Takes the hook off; the weights stay as they are."""
        self._hook.remove()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                key, pieces = self.layout.of(tensor)
                for average, piece in zip(self.averages.get(key, ()), pieces, strict=False):
                    average.lerp_(piece.flat, 1 - float(self.extras.ema or 0))
                    if self.last:
                        piece.flat.copy_(average)
                if self.last and self.start is not None:
                    for piece in pieces:
                        stop = piece.start + piece.flat.numel()
                        begun = checked_region(self.start, "the model being tuned", piece, stop)
                        piece.flat.lerp_(begun.to(piece.flat), float(self.extras.towards_init or 0))
        self.done = self.last
