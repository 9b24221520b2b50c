"""A part of a network: a view of one stored tensor, or of several stacked, whose axes each belong to one space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """An axis of a part: its length (-1: whatever the tensor has), its space, and `w`, `r` or `e` in it."""

    size: int
    space: str | None = None
    role: str = ""


@dataclass(frozen=True)
class Part:
    """The stored tensor `names[0]`, shape `shape`, seen as `grid`, cut by `take`, seen as `axes`.

    Several names are tensors of that shape, stacked on a new first axis of the grid (experts, a tensor each). The parts
    of a tensor tile it. `key` is the same for the corresponding parts of all families.
    """

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    take: tuple[tuple[int, int, int], ...]  # (axis of the grid, start, length)
    axes: tuple[Axis, ...]
    offset: float = 0.0  # maps act on offset + tensor
    optional: bool = False  # a checkpoint may lack it (pooler, classifier)
    factor: float = 1.0  # the network uses factor * tensor (Gemma's embeddings)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(a == b or b == -1 for a, b in zip(shape, self.shape))

    def view(self, whole: Tensor) -> Tensor:
        """The part of a contiguous tensor (the stack, if there are several), sharing its memory."""
        seen = whole.view(self.grid)
        for dim, start, length in self.take:
            seen = seen.narrow(dim, start, length)
        return seen.view([axis.size for axis in self.axes]) if self.axes else seen.view([])

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part, `axes` shaped; it may share memory with the tensors."""
        if len(self.names) == 1:
            return self.view(tensors[self.names[0]].contiguous())
        return self.view(torch.stack([tensors[name] for name in self.names]))

    def write(self, block: Tensor, out: dict[str, Tensor]) -> None:
        """Puts the part, `axes` shaped, into the tensors that hold it."""
        if len(self.names) == 1:
            self.view(out[self.names[0]]).copy_(block)
            return
        assert not self.take, "a tensor of a stack is one part"
        for name, piece in zip(self.names, block.unbind(0)):
            out[name].copy_(piece.reshape(out[name].shape))

    def stored(self, block: Tensor) -> tuple[int, ...]:
        """The shape of one of its tensors; a length that the table leaves open comes from its part of a block."""
        if -1 not in self.shape:
            return self.shape
        lead = 1 if len(self.names) > 1 else 0
        known = block.shape[[axis.size for axis in self.axes].index(-1) - lead]
        return tuple(known if size == -1 else size for size in self.shape)
