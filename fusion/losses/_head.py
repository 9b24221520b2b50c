"""The training loss from hidden states: the output head runs in chunks of positions, no (N, V) tensor outlives one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusion.losses._pick import pick
from fusion.losses._rows import INF, Fold, Rows, group_logsumexp
from fusion.losses._x import check_temperature

Divergence = Callable[..., Tensor]  # (log_q (n, B), rows, temperature=...) -> (n,)
IGNORED = -100


def chunked_loss(
    hidden: Tensor,  # (N, d)
    head: Callable[[Tensor], Tensor],  # (n, d) -> (n, V) logits, in any dtype
    labels: Tensor,  # (N,) int64 token of each row, -100 = none
    rows: Rows | None,  # targets of the positions `rows_at`, or of all N positions
    student_index: Tensor | Fold | None,  # (V,) bucket of each student token; None = each its own
    divergence: Divergence,
    lm_weight: float,
    lm_everywhere: bool,
    counts: tuple[float | Tensor, float | Tensor],  # labels and targets of the whole step, over accumulation and ranks
    temperature: float = 1.0,
    chunk: int = 256,
    rows_at: Tensor | None = None,  # (len(rows),) int64 ascending positions
    parameters: Sequence[Tensor] | None = None,  # of the head
    calls: int = 1,  # of the head, at least
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, sums): the scalar to differentiate, and detached ce_sum, kd_sum, labels, targets of these positions.

    With w = `lm_weight` and `lm_everywhere`, the sum over positions of w CE + (1 - w) KD where a target stands and of
    CE elsewhere, over the number of labels. Without it (FuseLLM's mixture, arXiv:2401.10491) w times the mean CE of
    all labels plus (1 - w) times the mean KD of all targets.
    A target at a position whose label is -100 is not used; positions without a label never reach the head.
    Without `parameters` chunks are checkpointed, and the head runs again in backward. Given `parameters`, all those the
    head uses, gradients are taken chunk by chunk in forward, which saves that run; sharded parameters cannot be given.
    A sharded head gathers its weight at every call, on all ranks together: give `calls` the number that the rank with
    the most positions needs, ceil(positions / chunk), and every rank makes as many.
    Raises ValueError for a temperature other than 1 on targets that are not whole or whose buckets join tokens.
    """
    groups = student_index if student_index is None or isinstance(student_index, Fold) else Fold.build(student_index)
    if rows is not None:
        rows, rows_at = usable(rows, rows_at, labels)
        if temperature != 1.0:
            check_temperature(rows, temperature)
            if groups is not None and not groups.plain:
                raise ValueError(
                    f"temperature {temperature} needs a teacher with the student's own vocabulary: tempering tokens "
                    f"and joining them into buckets do not commute; leave temperature at 1"
                )
    n_labels, n_targets = (torch.as_tensor(c, device=hidden.device).clamp(min=1) for c in counts)
    kept = torch.nonzero(labels != IGNORED).squeeze(1)

    def idle(states: Tensor) -> Tensor:
        """A zero that went through the head: other ranks wait for the gathering of its weight and for its gradient."""
        return head(states).float().nan_to_num(0.0, 0.0, 0.0).sum() * 0.0

    if kept.numel() == 0:
        nothing = [checkpointed(idle, hidden[:1]) for _ in range(max(calls, 1))]
        return torch.stack(nothing).sum(), sums_of(hidden.new_zeros(2, dtype=torch.float32), 0, 0)
    if kept.numel() < labels.numel():
        hidden, labels = hidden[kept], labels[kept]
    at = rows_at
    if rows is not None and at is not None:
        at = torch.searchsorted(kept, at)
        weight = torch.ones(labels.numel(), device=hidden.device)
        weight = weight.index_fill(0, at, lm_weight) if lm_everywhere else weight * lm_weight
        kd_weight = (1.0 - lm_weight) / (n_labels if lm_everywhere else n_targets)
    else:
        weight = torch.full((labels.numel(),), 1.0 if lm_everywhere else lm_weight, device=hidden.device)
        kd_weight = torch.zeros((), device=hidden.device)
    weight = weight / n_labels

    starts = range(0, labels.numel(), chunk)
    edges = torch.tensor([*starts, labels.numel()], device=hidden.device)
    cuts = [0] * len(edges) if at is None else torch.searchsorted(at, edges).tolist()

    def part(number: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss of one chunk, and its plain sums (2,) of CE and KD."""
        span, targets = slice(starts[number], starts[number] + chunk), slice(cuts[number], cuts[number + 1])
        logits = head(states)
        here = None if rows is None or at is None or targets.start == targets.stop else rows.select(targets)
        local = None if here is None or at is None else at[targets] - span.start
        ce, kd = losses(logits, labels[span], here, local, groups, divergence, temperature)
        loss = (ce * weight[span]).sum() + kd.sum() * kd_weight
        return loss, torch.stack([ce.detach().sum(), kd.detach().sum()])

    n_used = 0 if rows is None else len(rows)
    trained = parameters is not None and any(x.requires_grad for x in (hidden, *parameters))
    if parameters is not None and trained and torch.is_grad_enabled():
        loss, sums = EagerGradients.apply(part, chunk, hidden, *parameters)
        return loss, sums_of(sums, labels.numel(), n_used)
    pieces = [checkpointed(part, number, hidden[start : start + chunk]) for number, start in enumerate(starts)]
    more = [checkpointed(idle, hidden[:1]) for _ in range(calls - len(pieces))]
    loss = torch.stack([*(piece[0] for piece in pieces), *more]).sum()
    return loss, sums_of(torch.stack([piece[1] for piece in pieces]).sum(0), labels.numel(), n_used)


def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def usable(rows: Rows, rows_at: Tensor | None, labels: Tensor) -> tuple[Rows, Tensor]:
    """(rows, positions) of the targets that stand: present, at a position that has a label."""
    if rows_at is None:
        if len(rows) != labels.numel():
            raise ValueError(
                f"{len(rows)} rows for {labels.numel()} positions; pass rows_at, the positions they lie at"
            )
        rows_at = torch.arange(labels.numel(), device=labels.device)
    good = torch.nonzero(rows.present & (labels[rows_at] != IGNORED)).squeeze(1)
    if good.numel() == len(rows):
        return rows, rows_at
    return rows.select(good), rows_at[good]


def losses(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,)
    rows: Rows | None,  # m targets
    at: Tensor | None,  # (m,) their positions among the n
    groups: Fold | None,
    divergence: Divergence,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(ce (n,), kd (m,)) in float32 nats.

    The divergence sees the listed buckets only, then everything else as one bucket that no entry names: what depends
    on the student's distribution through those is unchanged, and no second tensor of the logits' size is needed.
    """
    n, width = logits.shape
    label_columns = torch.arange(n, device=logits.device) * width + labels
    if rows is None or at is None:
        picked, _, total = pick(logits, label_columns, label_columns[:0], False)
        return total - picked, total.new_zeros(0)
    entry_row, entry_column = torch.nonzero(rows.ids >= 0, as_tuple=True)
    buckets = rows.ids[entry_row, entry_column]
    if groups is None or groups.plain:
        columns, entries = buckets, None
    else:
        columns, entries = groups.pairs(buckets)
    columns = columns + width * at[entry_row if entries is None else entry_row[entries]]
    with_rest = rows.kind != "sampled"
    if temperature == 1.0:
        picked, other, total = pick(logits, torch.cat([label_columns, columns]), columns, with_rest)
        ce, values, ce_total = total - picked[:n], picked[n:], total
    else:
        picked, _, ce_total = pick(logits, label_columns, label_columns[:0], False)
        ce = ce_total - picked
        values, other, total = pick(logits / temperature, columns, columns, with_rest)
    if entries is not None:
        values = group_logsumexp(values, entries, buckets.numel())
    values = values - total[at][entry_row]
    k = rows.ids.shape[1]
    log_q = values.new_full((len(rows), k + 1 if with_rest else k), -INF)
    log_q = log_q.index_put((entry_row, entry_column), values)
    if with_rest:
        log_q = torch.cat([log_q[:, :k], (other - total)[at].unsqueeze(1)], 1)
    own = torch.arange(k, device=logits.device).expand_as(rows.ids).masked_fill(rows.ids < 0, -1)
    return ce, divergence(log_q, replace(rows, ids=own), temperature=temperature)


def sums_of(sums: Tensor, labels: int, targets: int) -> dict[str, Tensor]:
    return {
        "ce_sum": sums[0],
        "kd_sum": sums[1],
        "labels": torch.tensor(labels, device=sums.device),
        "targets": torch.tensor(targets, device=sums.device),
    }


class EagerGradients(torch.autograd.Function):
    """The sum of a loss over chunks, with the gradients of hidden states and parameters taken while it is computed."""

    @staticmethod
    def forward(ctx, part, chunk: int, hidden: Tensor, *parameters: Tensor):
        wanted = [p for p in parameters if p.requires_grad]
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        totals: list[Tensor] = []
        loss, sums = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(2, dtype=torch.float32)
        for number, start in enumerate(range(0, hidden.shape[0], chunk)):
            span = slice(start, start + chunk)
            with torch.enable_grad():
                states = hidden[span].detach().requires_grad_(hidden.requires_grad)
                value, plain = part(number, states)
                inputs = [states, *wanted] if hidden.requires_grad else wanted
                found = list(torch.autograd.grad(value, inputs))
            if gradient is not None:
                gradient[span] = found.pop(0)
            totals = [total.add_(new) for total, new in zip(totals, found, strict=True)] if totals else found
            loss, sums = loss + value.detach(), sums + plain
        ctx.gradients = totals if gradient is None else [gradient, *totals]
        ctx.needed = [hidden.requires_grad, *[p.requires_grad for p in parameters]]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed out already; it has no second backward")
        found, ctx.gradients = iter(ctx.gradients), None
        # in place: a copy would be one more tensor of the head's size
        return None, None, *[next(found).mul_(grad) if needed else None for needed in ctx.needed]
