"""Adapters into one adapter: on their factors (concat, lora_lego), or on their updates by any method of tensors."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion._adapter_files import PREFIX, Adapter, read_adapter
from fusion._adapters import load
from fusion._method import Method, weighed
from fusion._params import depths, layer_of
from fusion._partial import refuse_place
from fusion.checkpoint import Checkpoint, natural
from fusion.engine import _weights, merge_tensors
from fusion.merge._draw import Draw
from fusion.merge._factors import Factors, of_dense


def merge_adapters(
    method: str,
    adapters: Mapping[str, Path],  # in order; name -> directory
    out: Path,
    *,
    weights: Sequence[float] | None = None,  # 1 each when left out
    rank: int | None = None,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Any = None,  # wraps the modules: progress(work, description)
) -> Path:
    """The directory `out` with one PEFT adapter: float32 factors, lora_alpha = r everywhere, so that scales are 1.

    `concat` and `lora_lego` work on factors. Any other method merges the updates B A, with a base of zeros, and the
    result is the closest of `rank` (default: the largest rank of a module among the adapters). A module that an
    adapter does not change has an update of zeros there. Raises ValueError for adapters of different bases and shapes,
    and for ones that replace tensors (modules_to_save, biases), which have no rank to be merged in.
    """
    out = Path(out)
    refuse_place(out)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank: a whole number from 1 on is needed here, not {type(rank).__name__} {rank!r:.60}")
    opened = [Opened.of(name, Path(path)) for name, path in adapters.items()]
    found = Method.of(method)
    given = dict(params or {})
    if found.unit == "adapter" and rank is not None:
        given["rank"] = rank
    fitted = found.check(given, len(opened), base=True, weights=weighed(weights))
    of_each = _weights(found, weights, len(opened)).tolist()
    _go_together(opened)
    modules = sorted({module for one in opened for module in one.adapter.pairs}, key=natural)
    stacks = depths(modules)
    merged: dict[str, Factors] = {}
    for module in progress(modules, f"merging {len(opened)} adapters") if progress else modules:
        if found.unit == "adapter":
            concrete = found.resolve(fitted, module, layer_of(module, stacks))
            merged[module] = _on_factors(found, opened, module, of_each, concrete, seed)
        else:
            merged[module] = _on_updates(method, opened, module, weights, given, rank, seed, layer_of(module, stacks))
    _write(out, opened, merged)
    return out


@dataclass(frozen=True)
class Opened:
    """An adapter and the file its factors are read from."""

    name: str
    adapter: Adapter
    file: Checkpoint

    @staticmethod
    def of(name: str, directory: Path) -> Opened:
        adapter = read_adapter(directory)
        return Opened(name, adapter, Checkpoint.open(adapter.weights))

    def factors(self, module: str) -> Factors | None:
        """float32 A (r, in), B (out, r) with the scale in B; None where the module is left as it is."""
        pair = self.adapter.pairs.get(module)
        if pair is None:
            return None
        a, b = load(self.file, pair.a).flatten(1), load(self.file, pair.b).flatten(1) * pair.scale
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{module} of '{self.name}' has NaN or infinity in its factors; a merge would spread it")
        return a, b

    def shapes(self, module: str) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Of A behind its rank, of B without its rank, and whether it is an embedding's."""
        pair = self.adapter.pairs[module]
        a, b = self.adapter.tensors[pair.a].shape, self.adapter.tensors[pair.b].shape
        return a[1:], (b[0], *b[2:]), pair.embedding


def _on_factors(
    found: Method, opened: Sequence[Opened], module: str, weights: Sequence[float], params: Mapping[str, Any], seed: int
) -> Factors:
    factors, kept = [], []
    for one, weight in zip(opened, weights, strict=True):
        pair = one.factors(module)
        if pair is not None:
            factors.append(pair)
            kept.append(float(weight))
    supply: dict[str, Any] = {"weights": torch.tensor(kept), "name": module}
    supply["draw"] = Draw(seed, module, 0, sum(len(a) for a, _ in factors))
    return found.function(factors=factors, **{name: supply[name] for name in found.needs}, **params)


def _on_updates(
    method: str,
    opened: Sequence[Opened],
    module: str,
    weights: Sequence[float] | None,
    params: Mapping[str, Any],
    rank: int | None,
    seed: int,
    layer: tuple[int, int] | None,
) -> Factors:
    pairs = [one.factors(module) for one in opened]
    ranks = [len(pair[0]) for pair in pairs if pair is not None]
    some = next(pair for pair in pairs if pair is not None)
    zeros = torch.zeros(some[1].shape[0], some[0].shape[1])
    updates = [zeros if pair is None else pair[1] @ pair[0] for pair in pairs]
    name = f"{module}.weight"
    update = merge_tensors(method, updates, base=zeros, weights=weights, seed=seed, name=name, layer=layer, **params)
    return of_dense(update, max(ranks) if rank is None else rank)


def _go_together(opened: Sequence[Opened]) -> None:
    first = opened[0]
    for one in opened:
        if one.adapter.replaced:
            raise ValueError(
                f"{one.name} ({one.adapter.path}) replaces whole tensors ({min(one.adapter.replaced)}), which have no "
                "rank to be merged in; merge the models that it and the others make of their base instead"
            )
        for module in one.adapter.pairs:
            other = next(x for x in opened if module in x.adapter.pairs)
            if one.shapes(module) != other.shapes(module):
                raise ValueError(
                    f"{module}: {one.name} has factors of {one.shapes(module)[:2]} around their rank, {other.name} of "
                    f"{other.shapes(module)[:2]}; adapters of one base have the same"
                )
    bases = {one.name: one.adapter.config.get("base_model_name_or_path") for one in opened}
    if len(set(bases.values()) - {None, ""}) > 1:
        warnings.warn(f"the adapters name different bases: {bases}; {first.name}'s goes into the result", stacklevel=3)


def _write(out: Path, opened: Sequence[Opened], merged: Mapping[str, Factors]) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, (a, b) in merged.items():
        inner, outer, embedding = next(x for x in opened if module in x.adapter.pairs).shapes(module)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        ranks[module] = len(a)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{module}: the merged factors are not finite")
        tensors[f"{PREFIX}{module}.{names[0]}"] = a.reshape(len(a), *inner).contiguous()
        tensors[f"{PREFIX}{module}.{names[1]}"] = b.reshape(outer[0], len(a), *outer[1:]).contiguous()
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    first = opened[0].adapter.config
    config = {
        "peft_type": "LORA",
        **{key: first.get(key) for key in ("task_type", "base_model_name_or_path", "revision")},
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "modules_to_save": None,
        **_targets(opened, merged),
    }
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    os.rename(partial, out)


def _targets(opened: Sequence[Opened], merged: Iterable[str]) -> dict[str, Any]:
    """Which modules PEFT has to wrap: as the first adapter says it when all change the same ones, else all by name."""
    first = opened[0].adapter
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if all(one.adapter.pairs.keys() == first.pairs.keys() for one in opened):
        return {key: first.config.get(key) for key in keys}
    return {"target_modules": sorted(merged, key=natural)}
