"""Readings of a merge for its report: lengths and angles of task vectors, conflict of signs, of every 16th block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion.merge._x import BLOCK, Sum

EVERY = 16 * BLOCK


def observed(tensors: Tensor, base: Tensor | None, out: Tensor, start: int) -> dict[str, Sum]:  # (K, n), (n,), (n,)
    """The Gram matrix (K + 2, K + 2) of task vectors, the merged one and the base, over the sampled entries of a region
    that begins at `start`; how many they are, and of how many signs disagree. Without a base it is the models' mean."""
    n = tensors.shape[1]
    begun = min(max(0, BLOCK - start % EVERY), n) if start % EVERY else 0  # of a sampled block that rows cut in two
    first = min(-start % EVERY, n)
    whole = (n - first - BLOCK) // EVERY + 1 if n - first >= BLOCK else 0
    last = first + whole * EVERY
    if not begun and first == n:
        return {}

    def sampled(x: Tensor) -> Tensor:  # (..., n)
        blocks = x[..., first:].unfold(-1, BLOCK, EVERY).flatten(-2) if whole else x[..., :0]
        return torch.cat([x[..., :begun], blocks, x[..., last : last + BLOCK]], -1)

    rows = sampled(tensors)
    origin = rows.mean(0) if base is None else sampled(base)
    found = torch.cat([rows, sampled(out)[None], origin[None]])
    found[:-1] -= found[-1].clone()
    d = found[:-2]
    conflict = torch.count_nonzero((d.amin(0) < 0) & (d.amax(0) > 0))
    gram = (found @ found.T).double().cpu()  # to seven digits, which pictures do not show
    return {"gram": Sum(gram), "sampled": Sum(torch.tensor(found.shape[1])), "conflict": Sum(conflict.cpu())}


def reading(found: Mapping[str, Any], numel: int, has_base: bool) -> dict[str, Any]:
    """norms, cosines, moved, base_norm and conflict of a tensor, from what was observed of it; nothing of nothing."""
    if "gram" not in found:
        return {"norms": None, "cosines": None, "moved": None, "base_norm": None, "conflict": None}
    gram: list[list[float]] = [list(row) for row in found["gram"]]
    sampled = float(found["sampled"])
    lengths = [math.sqrt(max(gram[i][i], 0.0) * numel / sampled) for i in range(len(gram))]
    k = len(gram) - 2
    products = [[math.sqrt(max(gram[i][i] * gram[j][j], 0.0)) for j in range(k)] for i in range(k)]
    return {
        "norms": lengths[:k],
        "cosines": [[gram[i][j] / products[i][j] if products[i][j] > 0 else 0.0 for j in range(k)] for i in range(k)],
        "moved": lengths[k] if has_base else None,
        "base_norm": lengths[k + 1],
        "conflict": float(found["conflict"]) / sampled,
    }
