"""Entropic optimal transport (Cuturi 2013, arXiv:1306.0895), in the log domain, its entropy's weight annealed."""

import torch
from torch import Tensor

from alignment.match._plan import cost_of, hold, uniform


def sinkhorn(
    similarity: Tensor,  # (n, m), larger is better
    *,
    epsilon: float = 0.005,
    start: float = 0.5,
    iterations: int = 2000,
    tolerance: float = 1e-3,
) -> Tensor:
    """(n, m) float64 coupling that is smoother the larger `epsilon`, with uniform sums.

    Costs are rescaled to [0, 1], so that `epsilon` means the same for all spaces; it is halved from `start` on, each
    time from the potentials found before (Schmitzer 2019, arXiv:1610.06519). Raises ValueError where a similarity is
    not finite, for an `epsilon` that is not positive, and where after `iterations` at the last one a unit's mass is
    off by more than `tolerance` of it.
    """
    import ot

    if not 0 < epsilon <= start:
        raise ValueError(f"sinkhorn: epsilon must be above 0 and at most start; given: {epsilon}, start {start}")
    n, m = similarity.shape
    cost, a, b = cost_of(similarity), uniform(n), uniform(m)
    weight, known = start, None
    while True:
        last = weight <= epsilon
        # the solver's threshold is the norm of the error of the sums over donor units, of mass 1 / m each
        stop, most = (tolerance / max(n, m) / 10, iterations) if last else (tolerance / max(n, m), 100)
        plan, log = ot.bregman.sinkhorn_log(
            a, b, cost, weight, numItermax=most, stopThr=stop, warn=False, log=True, warmstart=known
        )
        if last:
            break
        finer = max(weight / 2, epsilon)
        known = (log["log_u"] * (weight / finer), log["log_v"] * (weight / finer))
        weight = finer
    remedy = "raise epsilon or iterations"
    return hold(torch.from_numpy(plan), tolerance, "sinkhorn", remedy)
