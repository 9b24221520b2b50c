"""Teachers mixed by how sure each is at the position (score modes of X-Token, arXiv:2605.21699)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.fuse._x import choice, common_kind, mix, positive, softmax_shares, static, taking_part
from fusion.losses._rows import INF, Rows

TARGETS = ("truncated", "whole")
SCORES = ("entropy", "max_prob")


def weighted(
    rows: Sequence[Rows],  # M teachers at N positions
    nats_per_byte: Tensor,  # (M, N), not used
    nats_per_token: Tensor,  # (M, N), not used
    *,
    weights: Sequence[float] | None = None,
    score: str = "entropy",
    temperature: float = 1.0,
) -> Rows:
    """The sum of the teachers' distributions with weights w_m exp(score_m / temperature), normalised at each position.

    The score is minus the row's entropy in nats over its buckets and tail, or its largest probability. Sampled rows
    are refused: weights that follow the draws would make their mixture biased.
    """
    kind = common_kind("weighted", rows, TARGETS)
    choice("weighted", "score", score, SCORES)
    positive("weighted", "temperature", temperature)
    sure = torch.stack([confidence(r, score) for r in rows])
    prior = static("weighted", rows, weights)
    return mix(rows, softmax_shares(sure / temperature + prior.log(), taking_part(rows) & (prior > 0)), kind)


def confidence(rows: Rows, score: str) -> Tensor:
    """(N,) float64, higher where the teacher is surer."""
    log_p = torch.cat([rows.log_probs, rows.tail.unsqueeze(1)], 1).double()
    if score == "max_prob":  # of one token: the tail is many; a zero stands in where a row may list none
        return torch.nn.functional.pad(log_p[:, :-1].exp(), (0, 1)).amax(1)
    return (log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(1)
