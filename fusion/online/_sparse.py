"""A task vector whose mask is drawn once, by its kept entries alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sparse:
    """A vector as its entries that are not zero: 8 bytes each."""

    index: Tensor  # (k,) int32, increasing; int64 where a piece has 2^31 entries or more
    value: Tensor  # (k,) float32

    @staticmethod
    def of(vector: Tensor) -> Sparse:  # (n,)
        index = vector.nonzero().flatten()
        small = len(vector) < 1 << 31
        return Sparse(index.int() if small else index, vector[index].clone())

    def into(self, start: int, out: Tensor) -> None:  # (m,)
        """Writes entries start, start + 1, ... of the vector."""
        ends = torch.tensor([start, start + len(out)], dtype=self.index.dtype, device=self.index.device)
        first, stop = torch.searchsorted(self.index, ends).tolist()
        out.zero_()
        out[self.index[first:stop].long() - start] = self.value[first:stop]
