"""Task vectors read from checkpoints where they are needed: no second model is ever built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion._say import nearest
from fusion.checkpoint import Source, open_source, region
from fusion.online.layouts import Piece


@dataclass(frozen=True)
class TaskVectors(Mapping[str, "Difference"]):
    """reference - base by parameter name; without a reference, the weights at the start of training - base.

    dtype: what is kept of it. bfloat16 keeps 8 bits of each entry at 2 bytes; alpha times its error is far below what
    an update rounds to. scale: what each is multiplied with.
    """

    base: Source
    reference: Source | None = None
    dtype: torch.dtype = torch.bfloat16
    scale: Mapping[str, float] | None = None

    def __getitem__(self, name: str) -> Difference:
        if name not in self.base.entries:
            raise KeyError(name)
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
        base = region(self.of.base, self.name, start, stop).float().to(weights.device)
        scale = 1.0 if self.of.scale is None else self.of.scale[self.name]
        if self.of.reference is None:
            return (weights.float() - base).mul_(scale).to(self.of.dtype)
        known = self.of.reference.entries
        if self.name not in known:
            raise ValueError(f"the reference has no tensor '{self.name}'{nearest(self.name, known)}")
        if known[self.name].shape != self.shape:
            raise ValueError(f"'{self.name}' is {known[self.name].shape} in the reference and {self.shape} in the base")
        there = region(self.of.reference, self.name, start, stop).float().to(weights.device)
        return (there - base).mul_(scale).to(self.of.dtype)


def checked_region(source: Source, what: str, piece: Piece, stop: int) -> Tensor:
    """(stop - piece.start,) float32; ValueError when there is no such tensor, or one of another shape."""
    if piece.name not in source.entries or source.entries[piece.name].shape != piece.shape:
        raise ValueError(f"{what} ({source.path}) has no tensor '{piece.name}' of {piece.shape}")
    return region(source, piece.name, piece.start, stop).float()


def refuse_ties(source: Source, what: str, names: Iterable[str], tied: Mapping[str, str]) -> None:
    """ValueError when the model ties two tensors that this checkpoint holds apart, or the other way round.

    A tied tensor has one name in the model, and a task vector of that name: the other one's would be lost. tied: from
    a name to the one it is tied to.
    """
    here = set(names)
    for name, source_name in tied.items():
        if name in here or name not in source.entries or source_name not in source.entries:
            continue
        if not source.config.get("tie_word_embeddings", True):
            raise ValueError(
                f"the model ties {name} to {source_name}, and the {what} ({source.path}) holds them apart: the change "
                f"of one of the two would be lost; take a {what} that ties them too"
            )
    head = next((name for name in here if name.endswith("lm_head.weight") and name not in source.entries), None)
    if head is not None and source.config.get("tie_word_embeddings"):
        raise ValueError(
            f"the {what} ({source.path}) ties {head} to its embeddings, and the model holds them apart; take models "
            f"that agree in tie_word_embeddings"
        )


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
