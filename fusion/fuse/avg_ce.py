"""AvgCE of FuseLLM: teachers mixed by how well they predict the text (Wan et al. 2024, arXiv:2401.10491)."""

import math
from collections.abc import Sequence

from torch import Tensor

from fusion.fuse._x import common_kind, mix, positive, scores, softmax_shares, taking_part
from fusion.losses._rows import Rows

TARGETS = ("sampled", "truncated", "whole")


def avg_ce(
    rows: Sequence[Rows],  # M teachers at N positions
    nats_per_byte: Tensor,  # (M, N) of the window each position lies in, nan where the teacher has none
    nats_per_token: Tensor,  # (M, N)
    *,
    unit: str = "byte",
    temperature: float = 1.0,
) -> Rows:
    """The sum of the teachers' distributions weighted by softmax(-score / temperature), score in bits per byte.

    `unit: token` is the published code's rule: softmax(exp(-nats per token) / temperature), whose weights differ by a
    factor of e at most when the temperature is 1.
    """
    kind = common_kind("avg_ce", rows, TARGETS)
    positive("avg_ce", "temperature", temperature)
    score = scores("avg_ce", rows, nats_per_byte, nats_per_token, unit)
    if unit == "byte":
        logits = -score / math.log(2) / temperature
    else:
        logits = ((-score).exp() / temperature).masked_fill(score == math.inf, -math.inf)
    return mix(rows, softmax_shares(logits, taking_part(rows)), kind)
