"""DeepSpeed ZeRO checkpoints, stages 1 to 3: where each parameter's float32 master weights lie (Rajbhandari et al.
2019, arXiv:1910.02054).

Stages 1 and 2 lay a group's parameters end to end and cut the whole into one stretch a rank; stage 3 cuts every
parameter into one stretch a rank, and each rank lays its stretches end to end. Both pad at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion._pickled import SIZES, Stored, plain, read_torch
from fusion._sharded import Parts, Piece, slices

CONVERT = "consolidate it first: python zero_to_fp32.py . OUT --safe_serialization, in the checkpoint's directory"


def zero_parts(folder: Path) -> dict[str, Parts]:
    """The parameters and persistent buffers of a global_step folder, by the names the model has for them.

    Raises ValueError for tensor, pipeline and expert parallelism, missing ranks and files of no optimizer.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder.parent}/latest names {folder.name}, which is not there")
    _refuse_parallel(folder)
    states = [read_torch(file) for file in _ranked(folder, "_optim_states.pt")]
    models = [read_torch(file) for file in _ranked(folder, "_model_states.pt")]
    optimizers = [state["optimizer_state_dict"] for state in states]
    _check_ranks(folder, optimizers)
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in models[0]["param_shapes"]]
    module = models[0]["module"]
    nominal = {name: one.dtype for name, one in module.items() if isinstance(one, Stored)}
    if "single_partition_of_fp32_groups" in optimizers[0]:
        ranks = [optimizer["single_partition_of_fp32_groups"] for optimizer in optimizers]
        paddings = optimizers[0].get("param_alignment_paddings")
        parts = _flat(folder, shapes, ranks, paddings, nominal)
    elif "fp32_flat_groups" in optimizers[0]:
        parts = _cut(folder, shapes, [optimizer["fp32_flat_groups"] for optimizer in optimizers], nominal)
    else:
        raise ValueError(f"{folder} holds no float32 weights of ZeRO stage 1, 2 or 3; {CONVERT}")
    parts |= _frozen(folder, models, nominal)
    parts |= {name: _whole(module[name]) for name in models[0]["buffer_names"] if name in module}
    return parts


def _flat(
    folder: Path, groups: list[dict[str, tuple]], ranks: list[list[Stored]], paddings: Any, nominal: dict[str, str]
) -> dict[str, Parts]:
    """Stages 1 and 2."""
    parts: dict[str, Parts] = {}
    for g, group in enumerate(groups):
        stretches = [rank[g] for rank in ranks]
        spans = slices([one.numel for one in stretches])
        at = 0
        for i, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            pieces = []
            for (low, high), stored in zip(spans, stretches):
                a, b = max(at, low), min(at + numel, high)
                if a < b:
                    pieces.append(_piece(stored, a - low, a - at, b - a))
            parts[name] = Parts(shape, _dtype(folder, stretches), nominal.get(name, "float32"), (numel,), tuple(pieces))
            at += numel + (int(paddings[g][i]) if paddings is not None else 0)
    return parts


def _cut(
    folder: Path, groups: list[dict[str, tuple]], ranks: list[list[Stored]], nominal: dict[str, str]
) -> dict[str, Parts]:
    """Stage 3: a parameter of n numbers has ceil(n / ranks) of them on each, in the same place on all."""
    parts: dict[str, Parts] = {}
    at = 0
    for name, shape in [item for group in groups for item in group.items()]:
        numel = math.prod(shape)
        share = math.ceil(numel / len(ranks))
        pieces = []
        for k, subgroups in enumerate(ranks):
            wanted = max(0, min(share, numel - k * share))  # the rest of the last share is padding
            for (low, high), stored in zip(slices([one.numel for one in subgroups]), subgroups):
                a, b = max(at, low), min(at + wanted, high)
                if a < b:
                    pieces.append(_piece(stored, a - low, k * share + a - at, b - a))
        parts[name] = Parts(shape, _dtype(folder, ranks[0]), nominal.get(name, "float32"), (numel,), tuple(pieces))
        at += share
    return parts


def _frozen(folder: Path, models: list[Any], nominal: dict[str, str]) -> dict[str, Parts]:
    """Parameters that no optimizer owns: whole with the first rank, or one share with each (stage 3)."""
    parts = {}
    for name, given in (models[0].get("frozen_param_shapes") or {}).items():
        shape = tuple(given)
        numel, at, pieces = math.prod(shape), 0, []
        fragments = [model["frozen_param_fragments"][name] for model in models]
        for fragment in fragments:
            count = min(fragment.numel, numel - at)
            if count > 0:
                pieces.append(_piece(fragment, 0, at, count))
                at += count
        dtype = _dtype(folder, fragments)
        parts[name] = Parts(shape, dtype, nominal.get(name, dtype), (numel,), tuple(pieces))
    return parts


def _whole(stored: Stored) -> Parts:
    piece = _piece(stored, 0, 0, stored.numel)
    return Parts(stored.shape, stored.dtype, stored.dtype, (stored.numel,), (piece,))


def _piece(stored: Stored, skip: int, at: int, count: int) -> Piece:
    """`count` numbers from number `skip` of a stored tensor on, at place `at` of the flattened parameter."""
    if not stored.contiguous:
        raise ValueError(f"{stored.file} holds a tensor that is not row-major or of dtype {stored.dtype}; {CONVERT}")
    here = Stored(stored.file, stored.offset + skip * SIZES[stored.dtype], stored.dtype, (count,))
    return Piece((at,), (count,), lambda: here)


def _dtype(folder: Path, stored: Iterable[Stored]) -> str:
    kinds = sorted({one.dtype for one in stored})
    if len(kinds) != 1:
        raise ValueError(f"{folder} holds pieces of one tensor as {' and '.join(kinds)}; {CONVERT}")
    return kinds[0]


def _ranked(folder: Path, ending: str) -> list[Path]:
    """The files of that ending in the order of their ranks."""
    files = [file for file in folder.iterdir() if file.name.endswith(ending)]
    if not files:
        raise ValueError(f"{folder} has no file *{ending}; a ZeRO checkpoint has one for every rank")
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _check_ranks(folder: Path, optimizers: list[Any]) -> None:
    """All ranks' files are there, and all hold shares of the same thing."""
    if any("ds_zero_partition_groups" in one for one in optimizers):
        raise ValueError(f"{folder} is partitioned over several groups of ranks; {CONVERT}")
    count = plain(optimizers[0].get("partition_count", len(optimizers)))
    ranks = max(count) if isinstance(count, (list, tuple)) else int(count)
    if ranks != len(optimizers):
        raise ValueError(f"{folder} was saved by {ranks} ranks, but has {len(optimizers)} files *_optim_states.pt")


def _refuse_parallel(folder: Path) -> None:
    names = [file.name for file in folder.iterdir()]
    for what, found in (
        ("tensor", [name for name in names if re.search(r"mp_rank_0*[1-9]", name)]),
        ("pipeline", [name for name in names if name.startswith("layer_") and "expert" not in name]),
        ("expert", [name for name in names if "expert" in name or name.startswith("expp_")]),
    ):
        if found:
            raise ValueError(
                f"{folder} was saved under {what} parallelism ({found[0]}), which is not read; convert it to a "
                "universal checkpoint (ds_to_universal.py) and consolidate that"
            )
