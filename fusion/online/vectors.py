"""Task vectors read from checkpoints where they are needed: no second model is ever built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion._say import nearest
from fusion.checkpoint import Source, open_source


@dataclass(frozen=True)
class TaskVectors(Mapping[str, "Difference"]):
    """reference - base by parameter name; without a reference, the weights at the start of training - base.

    dtype: what is kept of it. bfloat16 keeps 8 bits of each entry at 2 bytes; alpha times its error is far below what
    an update rounds to.
    """

    base: Source
    reference: Source | None = None
    dtype: torch.dtype = torch.bfloat16

    def __getitem__(self, name: str) -> Difference:
        return Difference(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.entries)

    def __len__(self) -> int:
        return len(self.base.entries)


@dataclass(frozen=True)
class Difference:
    """One tensor of a task vector."""

    of: TaskVectors
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.base.entries[self.name].shape

    def read(self, start: int, stop: int, weights: Tensor) -> Tensor:
        """(stop - start,) of the reference less the base."""
        base = region(self.of.base, self.name, start, stop).to(weights.device)
        if self.of.reference is None:
            return (weights.float() - base).to(self.of.dtype)
        if self.name not in self.of.reference.entries:
            known = self.of.reference.entries
            raise ValueError(f"the reference has no tensor '{self.name}'{nearest(self.name, known)}")
        there = self.of.reference.entries[self.name].shape
        if there != self.shape:
            raise ValueError(f"'{self.name}' is {there} in the reference and {self.shape} in the base")
        return (region(self.of.reference, self.name, start, stop).to(weights.device) - base).to(self.of.dtype)


def region(source: Source, name: str, start: int, stop: int) -> Tensor:
    """(stop - start,) float32."""
    raw = torch.empty(stop - start, dtype=source.entries[name].dtype)
    source.read(name, start, stop, raw)
    return raw.float()


def open_model(path: str | Path, what: str) -> Source:
    """A local directory, or a hub id, as a source; ValueError when it is neither."""
    if Path(path).is_dir():
        return open_source(path)
    text = str(path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"{what} is '{text}', which is neither a directory nor a hub id (owner/name)")
    from fusion import sources
    from fusion.recipe import ModelRef

    return open_source(sources.resolve(what, ModelRef(what, hub=text), Path(), Path(), lambda name: ()))
