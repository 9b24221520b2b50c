"""Readings of a merge for its report: lengths and angles of task vectors, conflict of signs, of every 16th block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusion.merge._sampled import sampled
from fusion.merge._x import Sum


def observed(tensors: Tensor, base: Tensor | None, out: Tensor, start: int) -> dict[str, Sum]:  # (K, n), (n,), (n,)
    """The Gram matrix (K + 2, K + 2) of task vectors, the merged one and the base, over the sampled entries of a region
    that begins at `start`; how many they are, and of how many signs disagree. Without a base it is the models' mean."""
    gram, (count, conflict) = sampled(tensors, base, out, start)
    return {"gram": Sum(gram), "sampled": Sum(count), "conflict": Sum(conflict)} if count else {}


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
