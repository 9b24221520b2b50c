"""The task vector of a LoRA adapter that is tuned further: what training did to its factors so far.

Merging in the factors' space is right only where the policy begins at the reference adapter (Lu et al. 2024,
arXiv:2405.17931, limitations): other adapters write the same change with other factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fusion._say import nearest
from fusion.checkpoint import Source

FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Factor:
    """One factor's task vector, checked against the policy's own where it is read."""

    name: str
    base: Tensor
    reference: Tensor | None  # None: the policy as it is
    begun: bool  # training has moved the policy already, so it need not be the reference
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def read(self, start: int, stop: int, weights: Tensor) -> Tensor:
        """(stop - start,) float32: the reference's factor less the base's."""
        own = weights.detach().float()
        base = self.base.flatten()[start:stop].float().to(own.device)
        if self.reference is None:
            return (own - base).mul_(self.scale)
        there = self.reference.flatten()[start:stop].float().to(own.device)
        if not self.begun and not torch.allclose(own, there, rtol=1e-2, atol=1e-6):
            raise ValueError(
                f"'{self.name}' is not the reference adapter's: other factors may write the same change, so a task "
                f"vector of factors fits only a policy that begins at the reference adapter; load that one to tune it"
            )
        return (there - base).mul_(self.scale)


def factors(
    names: list[str],
    base: str | Path | Source,
    reference: str | Path | Source | None,
    begun: bool,
    scales: Mapping[str, float] | None,
) -> dict[str, Factor]:
    """The task vectors of an adapter's factors by the policy's names for them; names: of what is trained.

    base, reference: directories that peft wrote. Raises ValueError for a base that is no adapter.
    """
    below, above = _adapter(base), None if reference is None else _adapter(reference)
    found = {}
    for name in names:
        stored = re.sub(r"(\.lora_\w+)\.[^.]+(?=\.|$)", r"\1", name)  # peft's files leave the adapter's name out
        for part, what in ((below, "base"), (above, "reference")):
            if part is not None and stored not in part:
                raise ValueError(f"the {what} adapter has no tensor '{stored}'{nearest(stored, part)}")
        there = None if above is None else above[stored]
        if there is not None and there.shape != below[stored].shape:
            raise ValueError(
                f"'{stored}' is {tuple(there.shape)} in the reference, {tuple(below[stored].shape)} in base"
            )
        found[name] = Factor(name, below[stored], there, begun, 1.0 if scales is None else scales[name])
    return found


def is_factors(model: str | Path | Source | None) -> bool:
    """Whether a directory holds an adapter alone; a Source of one is the whole model it makes."""
    return isinstance(model, (str, Path)) and (Path(model) / FILE).is_file()


def _adapter(model: str | Path | Source) -> dict[str, Tensor]:
    file = Path(model if isinstance(model, (str, Path)) else model.path) / FILE
    if not file.is_file():
        raise ValueError(
            f"base is an adapter, and {file.parent} has no {FILE}: the factors of a task vector are the difference of "
            f"two adapters; give base and reference as whole models to merge below the adapter"
        )
    return load_file(file)
