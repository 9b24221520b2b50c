"""Sparse target distributions at N positions of the student, and the folding of its vocabulary into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("sampled", "truncated", "whole")
INF = float("inf")


@dataclass(frozen=True)
class Rows:
    """Targets at N positions, each a distribution over buckets, padded to K entries.

    Row t is the distribution of token t given what precedes it. `sampled` rows hold the relative frequencies of
    draws (their tail is the share of draws that fell on a token without a bucket), `truncated` rows true
    log-probabilities of some buckets with the mass of all others in `tail`, `whole` rows every bucket that can have
    mass. No row lists a bucket twice.
    """

    ids: Tensor  # (N, K) int64 buckets, -1 is padding
    log_probs: Tensor  # (N, K) float32 nats, -inf at padding
    tail: Tensor  # (N,) float32 log mass outside the entries, -inf for none
    kind: str
    present: Tensor  # (N,) bool; a row without a target is all padding

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rows have no kind '{self.kind}'; kinds are {', '.join(KINDS)}")
        n = self.ids.shape[0]
        if self.ids.shape != self.log_probs.shape or self.tail.shape != (n,) or self.present.shape != (n,):
            shapes = [tuple(x.shape) for x in (self.ids, self.log_probs, self.tail, self.present)]
            raise ValueError(f"ids, log_probs, tail, present must be (N, K), (N, K), (N,), (N,); they are {shapes}")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @staticmethod
    def empty(n: int, kind: str, device: torch.device | str = "cpu") -> Rows:
        """N rows without a target."""
        nothing = torch.full((n, 0), -INF, device=device)
        absent = torch.zeros(n, dtype=torch.bool, device=device)
        return Rows(nothing.long(), nothing, torch.full((n,), -INF, device=device), kind, absent)

    @staticmethod
    def whole(log_probs: Tensor) -> Rows:  # (N, B) log-probabilities of all buckets
        """Rows that list every bucket 0 .. B-1."""
        n, width = log_probs.shape
        ids = torch.arange(width, device=log_probs.device).expand(n, width)
        tail = torch.full((n,), -INF, device=log_probs.device)
        return Rows(ids, log_probs.float(), tail, "whole", torch.ones(n, dtype=torch.bool, device=log_probs.device))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one after the other, padded to the widest. All must be of one kind."""
        kinds = sorted({part.kind for part in parts})
        if len(kinds) != 1:
            raise ValueError(f"rows of different kinds ({', '.join(kinds)}) do not join; record the stores by one rule")
        width = max(part.ids.shape[1] for part in parts)
        padded = [part.pad(width) for part in parts]
        ids = torch.cat([part.ids for part in padded])
        log_probs = torch.cat([part.log_probs for part in padded])
        tail = torch.cat([part.tail for part in padded])
        present = torch.cat([part.present for part in padded])
        return Rows(ids, log_probs, tail, kinds[0], present)

    def pad(self, width: int) -> Rows:
        """The same rows with at least `width` entries."""
        more = width - self.ids.shape[1]
        if more <= 0:
            return self
        ids = torch.nn.functional.pad(self.ids, (0, more), value=-1)
        return replace(self, ids=ids, log_probs=torch.nn.functional.pad(self.log_probs, (0, more), value=-INF))

    def select(self, index: Tensor | slice) -> Rows:
        """The rows at `index`, an int64 or bool tensor or a slice."""
        return replace(
            self,
            ids=self.ids[index],
            log_probs=self.log_probs[index],
            tail=self.tail[index],
            present=self.present[index],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on another device (accelerate moves batches by this method)."""
        ids, log_probs, tail, present = (
            x.to(device, non_blocking=non_blocking) for x in (self.ids, self.log_probs, self.tail, self.present)
        )
        return Rows(ids, log_probs, tail, self.kind, present)

    def mass(self) -> Tensor:
        """(N,) float64: probability in entries and tail, 1 wherever a target stands."""
        return self.log_probs.double().exp().sum(1) + self.tail.double().exp()


@dataclass(frozen=True)
class Fold:
    """The student's tokens grouped into buckets, as lists of members; most buckets hold the token of their own id."""

    starts: Tensor  # (B,) int64, first member of each bucket in `members`
    counts: Tensor  # (B,) int64, 0 for an id that is no bucket
    members: Tensor  # (M,) int64 columns of the student's head, ordered by bucket
    moved: Tensor  # (V,) bool, columns whose mass belongs to a bucket of another id
    plain: bool  # no column is moved, so that nothing needs folding

    @staticmethod
    def build(student_index: Tensor) -> Fold:  # (V,) int64 bucket of each student token, -1 = tail
        size = student_index.numel()
        order = torch.argsort(student_index, stable=True)
        members = order[student_index[order] >= 0]
        counts = torch.bincount(student_index[members], minlength=size)
        columns = torch.arange(size, device=student_index.device)
        moved = (student_index >= 0) & (student_index != columns)
        return Fold(counts.cumsum(0) - counts, counts, members, moved, not bool(moved.any()))

    @staticmethod
    def cat(parts: Sequence[Fold]) -> Fold:
        """One numbering for the buckets of several partitions: those of part m follow the ids of the parts before."""
        if len(parts) == 1:
            return parts[0]
        before = [sum(part.members.numel() for part in parts[:m]) for m in range(len(parts))]
        starts = torch.cat([part.starts + offset for part, offset in zip(parts, before, strict=True)])
        counts, members = torch.cat([part.counts for part in parts]), torch.cat([part.members for part in parts])
        return Fold(starts, counts, members, parts[0].moved, plain=False)

    def to(self, device: torch.device | str) -> Fold:
        starts, counts, members, moved = (x.to(device) for x in (self.starts, self.counts, self.members, self.moved))
        return Fold(starts, counts, members, moved, self.plain)

    def pairs(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # (E,) buckets
        """(columns (P,), entries (P,)): every member of every bucket in `ids`, and which of `ids` it belongs to."""
        counts = self.counts[ids]
        entries = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), counts)
        within = torch.arange(entries.numel(), device=ids.device) - (counts.cumsum(0) - counts)[entries]
        return self.members[self.starts[ids][entries] + within], entries


def fold(log_q: Tensor, student_index: Tensor | Fold) -> Tensor:  # (n, V) log-probabilities of tokens
    """(n, V) log-probabilities of buckets; ids that are no bucket get -inf.

    A token mapped to -1 keeps its column: no target names it, so its mass counts as the student's tail.
    """
    groups = student_index if isinstance(student_index, Fold) else Fold.build(student_index)
    if groups.plain:
        return log_q
    grouped = torch.nonzero((groups.counts > 1) | groups.moved & (groups.counts > 0)).squeeze(1)
    columns, entries = groups.pairs(grouped)
    sums = group_logsumexp(log_q[:, columns].T, entries, grouped.numel()).T
    return log_q.masked_fill(groups.moved, -INF).index_copy(1, grouped, sums)


def group_logsumexp(values: Tensor, group: Tensor, size: int) -> Tensor:  # (P, ...), (P,)
    """(size, ...) logsumexp of the values of each group; -inf for a group without values, with zero gradient."""
    index = group.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    floor = values.new_full((size, *values.shape[1:]), -INF)
    top = floor.scatter_reduce(0, index, values.detach(), "amax")
    top = top.masked_fill(top == -INF, 0.0)
    sums = torch.zeros_like(top).index_add(0, group, (values - top[group]).exp())
    return torch.where(sums > 0, sums, 1.0).log().add(top).masked_fill(sums == 0, -INF)
