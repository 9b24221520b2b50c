"""What the fusion rules share: who takes part at a position, and exact combination of sparse rows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusion.losses._rows import INF, Rows

UNITS = ("byte", "token")


def common_kind(rule: str, rows: Sequence[Rows], allowed: Sequence[str]) -> str:
    """The kind of what the rule makes of these rows.

    Raises ValueError when no teacher is given, numbers of positions differ, the rule has no unbiased reading of the
    kind, or sampled rows meet recorded probabilities.
    """
    if not rows:
        raise ValueError(f"{rule} has no teacher to fuse; give at least one")
    if len({len(r) for r in rows}) != 1:
        raise ValueError(f"{rule} got teachers with {[len(r) for r in rows]} positions; all must be at the same ones")
    kinds = sorted({r.kind for r in rows})
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(
                f"{rule} has no unbiased result from {kind} targets, only from {' and '.join(allowed)} ones: "
                f"record with top_k or nucleus instead of draws, or take fuse: mixture, min_ce or avg_ce"
            )
    if "sampled" in kinds and len(kinds) > 1:
        raise ValueError(
            f"{rule} cannot fuse {' with '.join(kinds)} targets: draws estimate every probability, a truncated list "
            f"knows some; record all teachers by one rule (all draws, or all top_k or nucleus)"
        )
    return "truncated" if len(kinds) > 1 else kinds[0]


def taking_part(rows: Sequence[Rows]) -> Tensor:
    """(M, N) bool: the teacher has a target there."""
    return torch.stack([r.present for r in rows])


def choice(rule: str, parameter: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        near = difflib.get_close_matches(str(given), allowed, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{rule}: {parameter} is '{given}', allowed are {', '.join(allowed)}{hint}")


def positive(rule: str, parameter: str, given: float) -> None:
    if not given > 0:
        raise ValueError(f"{rule}: {parameter} is {given}; it must be above 0")


def scores(rule: str, rows: Sequence[Rows], nats_per_byte: Tensor, nats_per_token: Tensor, unit: str) -> Tensor:
    """(M, N) float64 nats per byte or per token, inf where the teacher has no score: it did not read the window."""
    choice(rule, "unit", unit, UNITS)
    given = (nats_per_byte if unit == "byte" else nats_per_token).double()
    expected = (len(rows), len(rows[0]))
    if given.shape != expected:
        raise ValueError(f"{rule} needs scores of shape (teachers, positions) = {expected}, got {tuple(given.shape)}")
    return torch.where(given.isnan(), INF, given)


def static(rule: str, rows: Sequence[Rows], weights: Sequence[float] | None) -> Tensor:
    """(M, N) float64 weights of the teachers, 1 each when None."""
    given = [1.0] * len(rows) if weights is None else [float(w) for w in weights]
    if len(given) != len(rows):
        raise ValueError(f"{rule}: {len(given)} weights for {len(rows)} teachers; give one each")
    if not all(0.0 <= w < INF for w in given) or sum(given) == 0.0:
        raise ValueError(f"{rule}: weights are {given}; they must be finite, not negative, and not all 0")
    return torch.tensor(given, dtype=torch.float64).unsqueeze(1).expand(-1, len(rows[0])).to(rows[0].ids.device)


def shares(weights: Tensor, rows: Sequence[Rows]) -> Tensor:
    """(M, N) weights over those that take part, adding up to 1 wherever anyone with a weight does, else all 0."""
    weights = weights.masked_fill(~taking_part(rows), 0.0)
    total = weights.sum(0)
    return weights / torch.where(total > 0, total, 1.0)


def softmax_shares(logits: Tensor, part: Tensor) -> Tensor:  # (M, N) float64, (M, N) bool: who takes part
    """(M, N) softmax over those that take part, 0 where nobody does; equal shares where none of them has a score."""
    logits = logits.masked_fill(~part, -INF)
    logits = torch.where((logits == -INF).all(0), 0.0, logits).masked_fill(~part, -INF)
    return torch.softmax(logits.masked_fill(~part.any(0), 0.0), 0).masked_fill(~part, 0.0)


def pick_rows(rows: Sequence[Rows], index: Tensor, kind: str) -> Rows:  # (N,) teacher of each position
    """Position by position the row of one teacher."""
    width = max(r.ids.shape[1] for r in rows)
    padded = [r.pad(width) for r in rows]
    out = replace(padded[0], kind=kind)
    for m, other in enumerate(padded[1:], 1):
        here = index == m
        column = here.unsqueeze(1)
        out = Rows(
            torch.where(column, other.ids, out.ids),
            torch.where(column, other.log_probs, out.log_probs),
            torch.where(here, other.tail, out.tail),
            kind,
            torch.where(here, other.present, out.present),
        )
    return out


class Union:
    """The entries of all teachers side by side, sorted by bucket, so that equal buckets form runs within a row.

    shares (M, N): only teachers with a share above 0 count, the others' entries are ignored.
    """

    def __init__(self, rows: Sequence[Rows], shares: Tensor) -> None:
        active = shares > 0
        ids = torch.cat([r.ids for r in rows], 1)
        log_probs = torch.cat([r.log_probs for r in rows], 1).double()
        teacher = torch.cat([torch.full((r.ids.shape[1],), m, device=ids.device) for m, r in enumerate(rows)])
        live = (ids >= 0) & active.T[:, teacher]
        key, order = torch.sort(ids.masked_fill(~live, torch.iinfo(torch.int64).max), dim=1, stable=True)
        self.live = live.gather(1, order)
        self.teacher = teacher.expand_as(ids).gather(1, order)  # (N, S)
        self.log_probs = log_probs.gather(1, order).masked_fill(~self.live, -INF)
        self.ids = key.masked_fill(~self.live, -1)
        new = torch.ones_like(self.live)
        new[:, 1:] = key[:, 1:] != key[:, :-1]
        self.run = new.cumsum(1) - 1  # (N, S) number of the run an entry is in
        # a teacher that lists all its mass gives exactly 0 to any bucket it does not list
        complete = torch.stack([r.tail == -INF if r.kind != "whole" else torch.ones_like(r.present) for r in rows])
        partial = active & ~complete
        listed = self.total((self.live & partial.T.gather(1, self.teacher)).long())
        self.known = self.live & (listed.gather(1, self.run) == partial.sum(0).unsqueeze(1))

    def total(self, values: Tensor) -> Tensor:  # (N, S)
        """(N, S) sums over runs; run r of a row in column r."""
        return torch.zeros_like(values).scatter_add(1, self.run, values)

    def rows(self, mass: Tensor, keep: Tensor, tail: Tensor, kind: str, present: Tensor) -> Rows:
        """Rows of the runs whose entries are in `keep` (N, S), `mass` (N, S) by run, heaviest first; tail (N,) mass.

        A row that keeps no bucket says nothing: no target stands there, so that the language-model loss stays whole.
        """
        ids = torch.full_like(self.ids, -1).scatter_reduce(1, self.run, self.ids.masked_fill(~keep, -1), "amax")
        mass = mass.masked_fill(ids < 0, 0.0)
        ids = ids.masked_fill(mass <= 0, -1)
        mass, order = torch.sort(mass, dim=1, descending=True, stable=True)
        width = int((ids >= 0).sum(1).max()) if ids.numel() else 0
        ids = ids.gather(1, order)[:, :width]
        return Rows(ids, mass[:, :width].log().float(), tail.log().float(), kind, present & (ids >= 0).any(1))


def mix(rows: Sequence[Rows], shares: Tensor, kind: str) -> Rows:  # shares (M, N), adding up to 1 or 0
    """The weighted sum of the teachers' distributions, exact on every bucket it lists.

    Draws are pooled. Of probabilities, a bucket is listed where each teacher with a share lists it or is known to give
    it nothing; anything else goes, with the mass its teachers gave it, to the tail: the finest partition on which the
    sum is known.
    """
    if len(rows) == 1:
        return rows[0]
    union = Union(rows, shares)
    share = shares.T.gather(1, union.teacher)
    mass = union.log_probs.exp() * share
    tail = (torch.stack([r.tail for r in rows]).double().exp() * shares).sum(0)
    keep = union.live if kind == "sampled" else union.known
    tail = tail + mass.masked_fill(keep, 0.0).sum(1)
    present = shares.sum(0) > 0
    return union.rows(union.total(mass.masked_fill(~keep, 0.0)), keep, tail, kind, present)
