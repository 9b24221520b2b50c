"""What is to be written, tensor by tensor, and from what: decided from headers before anything is read.

Every tensor of every model is accounted for; what does not fit is refused in one sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from fusion import _misfit
from fusion._layers import Take, stacked
from fusion._say import nearest
from fusion.checkpoint import Entry, Source

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Task:
    """One tensor to be written. merge: out of all models; copy: from one; same: from one, and all must agree."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as written
    action: Literal["merge", "copy", "same"]
    sources: tuple[str, ...]  # its name in each model; for a copy its name in `origin` alone
    base: str | None = None  # its name in the base
    origin: str = ""  # the model a copy comes from; "" is the base

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.shape, self.dtype, self.dtype)

    @property
    def numel(self) -> int:
        return self.entry.numel

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """The models of a merge in order, and their base, all under the target's names."""

    models: Mapping[str, Source]
    base: Source | None = None

    def source(self, name: str) -> Source:
        """The model called so; "" is the base."""
        if name:
            return self.models[name]
        assert self.base is not None
        return self.base

    @property
    def target(self) -> tuple[str, Source]:
        """What the result looks like: the base, or the first model."""
        return ("", self.base) if self.base is not None else next(iter(self.models.items()))

    @property
    def everyone(self) -> dict[str, Source]:
        """All models, and the base under "" (a base that is one of the models, too)."""
        return {**self.models, **({} if self.base is None else {"": self.base})}


def tasks(
    inputs: Inputs,
    *,
    only: Sequence[str] | None = None,
    copy: Sequence[str] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    dtype: str | None = None,
) -> tuple[list[Task], dict[str, Any]]:
    """The tensors to write, in the order of the target's files, and the result's configuration.

    Raises ValueError for tensors that are missing, extra, misshapen, quantised, of another dtype, or tied in one model
    and not in another.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype '{dtype}' is unknown{nearest(dtype, FLOATS)}")
    wanted = None if dtype is None else FLOATS[dtype]
    for name, source in inputs.everyone.items():
        _misfit.refuse_codes(_misfit.called(name), source)
    config = dict(inputs.target[1].config)
    if layers is not None:
        _misfit.refuse_heads(inputs)
        takes, config = stacked(inputs, layers)
        found = [_taken(take, inputs, wanted) for take in takes]
    else:
        found = _merged(inputs, only, copy, wanted)
    if wanted is not None:
        key = next((key for key in ("dtype", "torch_dtype") if key in config), "dtype")
        config = config | {key: dtype} if config else config
    return found, config


def _taken(take: Take, inputs: Inputs, wanted: torch.dtype | None) -> Task:
    entry = inputs.source(take.model).entries[take.source]
    return Task(take.name, entry.shape, _written(entry, wanted), "copy", (take.source,), origin=take.model)


def _written(entry: Entry, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and entry.stored.is_floating_point else entry.stored


def _merged(
    inputs: Inputs, only: Sequence[str] | None, copy: Sequence[str] | None, wanted: torch.dtype | None
) -> list[Task]:
    target_name, target = inputs.target
    for what, globs in (("only", only), ("copy", copy)):
        for glob in globs or ():
            if not any(fnmatchcase(name, glob) for name in target.entries):
                raise ValueError(f"{what}: no tensor is called like '{glob}'{nearest(glob, target.entries)}")
    hidden = _misfit.tied_heads(inputs)
    merging = [
        name
        for name in target.entries
        if (only is None or any(fnmatchcase(name, glob) for glob in only))
        and not any(fnmatchcase(name, glob) for glob in copy or ())
        and name not in hidden
    ]
    if only is not None and inputs.base is not None:  # what nobody else has stays the base's
        merging = [name for name in merging if any(name in one.entries for one in inputs.models.values())]
    _misfit.refuse_gaps(inputs, merging, only, hidden)
    _misfit.refuse_shapes(inputs, merging)
    _misfit.refuse_vocabularies(inputs, merging)
    if any("att" in name for name in merging):
        _misfit.refuse_heads(inputs)
    _misfit.refuse_dtypes(inputs, merging, wanted)
    chosen = set(merging)
    found = []
    for name, entry in target.entries.items():
        if name in hidden:
            continue
        if name not in chosen:
            found.append(Task(name, entry.shape, _written(entry, wanted), "copy", (name,), origin=target_name))
            continue
        sources = (name,) * len(inputs.models)
        first = next(iter(inputs.models.values())).entries[name]
        numbers = first.dtype.is_floating_point
        base = name if inputs.base is not None else None
        action: Literal["merge", "same"] = "merge" if numbers else "same"
        found.append(Task(name, entry.shape, _written(first, wanted), action, sources, base))
    return found
