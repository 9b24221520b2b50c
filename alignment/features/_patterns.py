"""A head is where it looks: the attention patterns of two networks' heads on the same bytes, in sums over documents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Patterns:
    """Inner products of the patterns of H heads of a target and H' of a donor, each less the mean over its heads."""

    cross: Tensor = field(default_factory=lambda: torch.zeros(()))  # (H, H')
    own: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(()), torch.zeros(())))  # (H,), (H',)

    def update(self, target: Tensor, donor: Tensor, rows: Tensor, others: Tensor) -> None:
        """Patterns (H, T, T) and (H', T', T') of one document, of which positions `rows` and `others` (n,) end at the
        same bytes.

        What a head looks at between two such positions counts together, so that other tokens play no part.
        """
        one, other = _folded(target, rows), _folded(donor, others)
        self.cross = self.cross + one @ other.mT
        self.own = (self.own[0] + one.square().sum(1), self.own[1] + other.square().sum(1))

    def similarity(self) -> Tensor:
        """(H, H') cosines; 0 for a head that looks where all heads of its network look."""
        sizes = self.own[0].sqrt()[:, None] * self.own[1].sqrt()
        return self.cross / sizes.clamp_min(torch.finfo(torch.float64).tiny)


def _folded(pattern: Tensor, rows: Tensor) -> Tensor:
    """(H, n * n): what each of the positions looks at, from the position after one of them to the next."""
    upto = pattern.double()[:, rows].cumsum(-1)[:, :, rows]
    spans = upto.diff(dim=-1, prepend=torch.zeros_like(upto[:, :, :1])).flatten(1)
    return spans - spans.mean(0)
