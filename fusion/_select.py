"""Which entries of a distribution a store keeps: random draws, the k largest, or a nucleus.

Draws: "Sparse Logit Sampling" (Anshumann et al. 2025, arXiv:2503.16870) keeps tokens drawn from the teacher with their
counts, an unbiased estimate of the distribution. Here the draws are systematic (Madow 1949): one uniform u places the
draws at (u + i) / draws on the cumulative sum, so that a count is the floor or the ceiling of draws * p. That is still
unbiased, varies less than independent draws and needs one random number a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Which entries of a distribution are kept: exactly one of draws, top_k and nucleus is positive."""

    draws: int = 0  # random draws, kept with their counts
    top_k: int = 0  # the k most likely
    nucleus: float = 0.0  # the smallest set with that much mass, at most `cap` entries
    cap: int = 64

    def __post_init__(self) -> None:
        given = [name for name in ("draws", "top_k", "nucleus") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of draws, top_k and nucleus says what is kept; given: {', '.join(given) or 'none'}"
            )
        if not 0 <= self.draws < 1 << 16 or self.top_k < 0 or self.cap < 1 or not 0 <= self.nucleus <= 1:
            raise ValueError(
                f"draws ({self.draws}) is 1 to 65535, top_k ({self.top_k}) at least 1, nucleus ({self.nucleus}) in "
                f"(0, 1] and cap ({self.cap}) at least 1"
            )

    @classmethod
    def of(
        cls, draws: int | None = None, top_k: int | None = None, nucleus: float | None = None, cap: int = 64
    ) -> Rule:
        """The rule a recipe asks for: 16 draws when it says nothing; ValueError when it says two things."""
        given = {"draws": draws, "top_k": top_k, "nucleus": nucleus}
        said = {name: value for name, value in given.items() if value is not None}
        for name, value in said.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} are both given; a store keeps its entries by one rule")
        return cls(**(said or {"draws": 16}), cap=cap)  # type: ignore[arg-type]

    def kind(self, vocabulary: int) -> str:
        """`sampled`, `truncated`, or `whole` when every token of the vocabulary is kept."""
        return "sampled" if self.draws else "whole" if self.top_k >= vocabulary else "truncated"

    def most(self, vocabulary: int) -> int:
        """The most entries a row can have."""
        return min(vocabulary, self.draws or self.top_k or self.cap)


class Entries(NamedTuple):
    """What is kept of N distributions over V tokens; row r owns the `lengths[r]` entries after those of row r - 1."""

    lengths: Tensor  # (N,) int64
    ids: Tensor  # (E,) int64; by descending probability (truncated), by ascending id (sampled)
    log_probs: Tensor  # (E,) float32 nats; log(count / draws) when sampled, the true log-probability else
    tail: Tensor  # (N,) float32 log of the mass that no entry has; -inf for none
    normaliser: Tensor  # (N,) float64; logit - normaliser is a log-probability


BLOCK = 64  # tokens; a cumulative sum over blocks finds a draw's block, one inside the block its token
ELEMENTS = 1 << 20  # logits handled at once: their exponentials stay in the processor's cache


def uniforms(seed: int, digest: str, rows: int) -> np.ndarray:
    """float64 (rows,) in [0, 1): a hash (splitmix64, Steele et al. 2014) of seed, document and row alone."""
    with np.errstate(over="ignore"):
        state = np.full(rows, seed % (1 << 64), np.uint64)
        for word in (int(digest[:16], 16), int(digest[16:32] or "0", 16), np.arange(rows, dtype=np.uint64)):
            state = _mix(state ^ np.asarray(word, np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def select(logits: Tensor, rule: Rule, uniforms: Tensor) -> Entries:
    """The entries that `rule` keeps of logits (N, V) float32; uniforms (N,) float64 in [0, 1) place the draws.

    A row with a NaN or infinite logit gets a NaN normaliser and entries without meaning: the caller looks, because it
    knows the document.
    """
    import torch

    rows, vocabulary = logits.shape
    step = max(1, ELEMENTS // max(vocabulary, rule.draws * BLOCK))
    keep = _draw if rule.draws else _largest
    parts = [keep(logits[n : n + step], rule, uniforms[n : n + step]) for n in range(0, rows, step)]
    return Entries(*(torch.cat(column) for column in zip(*parts)))


def _mass(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """exp(logits - maximum) (N, width), filled up with zeros, and the maximum (N,), NaN where a logit is not finite."""
    import torch

    high = logits.amax(dim=1)
    high = torch.where(torch.isfinite(high) & torch.isfinite(logits.amin(dim=1)), high, torch.nan)
    mass = logits.new_zeros(len(logits), width)
    inside = mass[:, : logits.shape[1]]
    torch.sub(logits, high[:, None], out=inside)
    inside.exp_()
    return mass, high.double()


def _draw(logits: Tensor, rule: Rule, uniforms: Tensor) -> Entries:
    import torch

    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    mass, high = _mass(logits, blocks * BLOCK)
    mass = mass.view(rows, blocks, BLOCK)
    block_mass = mass.sum(dim=2, dtype=torch.float64)
    cumulative = torch.cumsum(block_mass, dim=1)
    total = cumulative[:, -1:].contiguous()  # (N, 1)
    steps = torch.arange(rule.draws, dtype=torch.float64, device=logits.device)
    positions = (uniforms[:, None] + steps) / rule.draws * total  # (N, draws), ascending
    block = _find(cumulative, positions)
    inner = torch.cumsum(mass[torch.arange(rows, device=logits.device)[:, None], block], dim=2, dtype=torch.float64)
    rest = positions - (cumulative - block_mass).gather(1, block)
    token = block * BLOCK + _find(inner, rest[:, :, None])[:, :, 0]
    flat = token + torch.arange(rows, device=logits.device)[:, None] * vocabulary
    # ascending within a row and between rows: equal neighbours are draws of one token
    kept, counts = torch.unique_consecutive(flat.flatten(), return_counts=True)
    return Entries(
        lengths=torch.bincount(kept // vocabulary, minlength=rows),
        ids=kept % vocabulary,
        log_probs=torch.log(counts.double() / rule.draws).float(),
        tail=torch.full((rows,), -torch.inf, device=logits.device),
        normaliser=high + torch.log(total[:, 0]),
    )


def _find(cumulative: Tensor, positions: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds each position; an entry without mass is never found.

    Rounding can put a position at the total itself: it belongs to the entry where the sum first reaches the total.
    """
    import torch

    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    found = torch.minimum(torch.searchsorted(cumulative, positions, right=True), last)
    return found.clamp(max=cumulative.shape[-1] - 1)  # NaN masses: the caller throws the row away


def _largest(logits: Tensor, rule: Rule, uniforms: Tensor) -> Entries:
    import torch

    rows, vocabulary = logits.shape
    mass, high = _mass(logits, vocabulary)
    log_total = torch.log(mass.sum(dim=1, dtype=torch.float64))
    values, ids = torch.topk(logits, min(rule.top_k or rule.cap, vocabulary), dim=1)
    log_probs = values.double() - (high + log_total)[:, None]
    keep = torch.ones_like(ids, dtype=torch.bool)
    if rule.nucleus:  # the smallest set that holds the mass: an entry is in when those before it hold less
        keep = torch.cumsum(log_probs.exp(), dim=1) - log_probs.exp() < rule.nucleus
    # The others' mass is summed up, not taken as 1 minus the kept: the latter has no digits left where it is small.
    mass.scatter_(1, ids, torch.where(keep, 0.0, mass.gather(1, ids)))
    return Entries(
        lengths=keep.sum(dim=1),
        ids=ids[keep],
        log_probs=log_probs[keep].float(),
        tail=(torch.log(mass.sum(dim=1, dtype=torch.float64)) - log_total).float(),
        normaliser=high + log_total,
    )
