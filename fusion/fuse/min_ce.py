"""MinCE of FuseLLM: the teacher that predicts the window best, or nobody (Wan et al. 2024, arXiv:2401.10491)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.fuse._x import common_kind, pick_rows, scores, taking_part
from fusion.losses._rows import Rows

TARGETS = ("sampled", "truncated", "whole")
SELECTS = True  # a row is one teacher's as it stands: teachers need no common buckets, each keeps its finest


def min_ce(
    rows: Sequence[Rows],  # M teachers at N positions
    nats_per_byte: Tensor,  # (M, N) of the window each position lies in, nan where the teacher has none
    nats_per_token: Tensor,  # (M, N)
    *,
    unit: str = "byte",
) -> Rows:
    """At each position the row of the teacher with the least cross-entropy of the window.

    Where that teacher has no target nobody speaks for it: a worse one would teach what the best one corrects. `unit:
    token` is the paper's rule, which favours finer tokenizers. Of equals the first that has a target is taken.
    """
    kind = common_kind("min_ce", rows, TARGETS)
    score = scores("min_ce", rows, nats_per_byte, nats_per_token, unit)
    best = score == score.amin(0)
    chosen = best & taking_part(rows)
    return pick_rows(rows, torch.where(chosen.any(0), chosen.long().argmax(0), best.long().argmax(0)), kind)
