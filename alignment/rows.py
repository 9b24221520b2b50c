"""Rows for tokens that a model does not have, each a combination of a few rows that it has.

One combination of a token serves every table with a row a token: the embedding, the head, the head's bias.
    pieces  the mean over the model's own tokens that the missing token's bytes split into
            (Gee et al. 2022, arXiv:2402.09977)
    omp     orthogonal matching pursuit (Pati et al. 1993): a model that has the token writes its row as a combination
            of the rows of tokens that both have, and the same combination is taken of the other model's rows
            (Goddard and Fernandes Neto 2025, arXiv:2506.06607)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from alignment._first import lowest_ids, mid_text
from alignment._pieces import Pieces, fast, is_text, pieces, whole

ELEMENTS = 1 << 25  # float32 numbers of work space: 128 MiB
STRINGS = 4096  # encoded at once
DEPENDENT = 1e-4  # an atom of length 1 with less than that outside the span of those taken adds nothing but rounding


@dataclass(frozen=True, eq=False)
class Mix:
    """M new rows: row m is the sum over j of weights[m, j] times the model's row ids[m, j]."""

    ids: Tensor  # (M, k) int64
    weights: Tensor  # (M, k) float32; 0 where a row needs fewer than k

    @classmethod
    def means(cls, members: Sequence[Sequence[int]]) -> Mix:
        """Each row the plain mean of its members' rows; one without members is zero."""
        width = max((len(one) for one in members), default=0) or 1
        ids, weights = np.zeros((len(members), width), np.int64), np.zeros((len(members), width), np.float32)
        for row, one in enumerate(members):
            ids[row, : len(one)] = one
            weights[row, : len(one)] = 1 / max(len(one), 1)
        return cls(torch.from_numpy(ids), torch.from_numpy(weights))

    def rows(self, table: Tensor) -> Tensor:
        """The new rows (M, ...) float32 of a table (V, ...)."""
        flat = table.reshape(len(table), -1)
        result = torch.empty(len(self.ids), flat.shape[1])
        step = max(1, ELEMENTS // (self.ids.shape[1] * max(flat.shape[1], 1)))
        for start in range(0, len(self.ids), step):
            here = slice(start, start + step)
            result[here] = torch.bmm(self.weights[here, None], flat[self.ids[here]].float())[:, 0]
        return result.reshape(-1, *table.shape[1:])


def splits(strings: Sequence[bytes], tokenizer: Any) -> list[list[int]]:
    """For each byte string the ids it splits into in the middle of a text: the tokenizer's own encoding where that
    spells the bytes; for a part of a character, which cannot be encoded, the longest pieces from the left; else the
    encoding without unknown tokens, which may be empty."""
    take, backend = pieces(tokenizer), fast(tokenizer)
    texts = [(n, data.decode()) for n, data in enumerate(strings) if is_text(data)]
    found: dict[int, list[int]] = {}
    for side in [inside, backend] if (inside := mid_text(backend)) is not None else [backend]:
        left = [(n, text) for n, text in texts if n not in found]
        for (n, _), ids in zip(left, _encode([text for _, text in left], side), strict=True):
            if _spelt(take, ids) == strings[n]:
                found[n] = ids
    left = [(n, text) for n, text in texts if n not in found]
    loose = dict(zip([n for n, _ in left], _encode([text for _, text in left], backend), strict=True))
    table = lowest_ids(take) if len(found) < len(strings) else {}
    longest = max(map(len, table), default=1)
    for n, data in enumerate(strings):
        if n not in found:
            cut = _longest_pieces(data, table, longest)
            known = [index for index in loose.get(n, []) if index not in take.special]
            found[n] = cut if _spelt(take, cut) == data else known or cut
    return [found[n] for n in range(len(strings))]


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    found: list[list[int]] = []
    with whole(tokenizer):
        for start in range(0, len(texts), STRINGS):
            part = tokenizer.encode_batch_fast(texts[start : start + STRINGS], add_special_tokens=False)
            found += [encoding.ids for encoding in part]
    return found


def _spelt(take: Pieces, ids: Sequence[int]) -> bytes:
    return b"".join(take.text[index] or b"" for index in ids)


def _longest_pieces(data: bytes, table: dict[bytes, int], longest: int) -> list[int]:
    """Greedy from the left; a byte that no piece begins with is left out."""
    found, start = [], 0
    while start < len(data):
        size = next((n for n in range(min(longest, len(data) - start), 0, -1) if data[start : start + n] in table), 0)
        if size:
            found.append(table[data[start : start + size]])
        start += size or 1
    return found


def omp(
    targets: Tensor,
    atoms: Tensor,
    k: int = 64,
    tolerance: float = 1e-5,
    advance: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> Mix:
    """Targets (M, d) as combinations of at most k of the atoms (N, d); the ids count atoms. Computed on `device`.

    Each round takes the atom with the largest cosine to what is left over and fits all taken ones again by least
    squares; a row is done early when what is left is `tolerance` of its length. `advance(n)` hears of every n rows.
    """
    if not len(atoms) or k < 1:
        raise ValueError(f"orthogonal matching pursuit needs atoms and k of at least 1; given: {len(atoms)}, k {k}")
    k = min(k, *atoms.shape)
    lengths = atoms.float().norm(dim=1)
    unit = atoms.float() / lengths.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    unit = unit.to(device)
    step = max(1, ELEMENTS // max(len(atoms), k * atoms.shape[1]))
    ids, weights = torch.zeros(len(targets), k, dtype=torch.int64), torch.zeros(len(targets), k)
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        picked, found = (one.cpu() for one in _pursue(targets[here].to(device).float(), unit, k, tolerance))
        ids[here], weights[here] = picked, torch.where(found == 0, found, found / lengths[picked])
        if advance is not None:
            advance(len(ids[here]))
    return Mix(ids, weights)


def _pursue(targets: Tensor, unit: Tensor, k: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Ids and weights (m, k) for targets (m, d) and atoms of length 1 (N, d).

    The taken atoms are kept as an orthonormal basis Q with atoms = R^T Q, so that a round costs one projection, and the
    weights come from one triangular system at the end.
    """
    m, d = targets.shape
    basis, upper = targets.new_zeros(m, k, d), torch.eye(k, device=targets.device).repeat(m, 1, 1)
    ids = torch.zeros(m, k, dtype=torch.int64, device=targets.device)
    rest, live = targets.clone(), torch.ones(m, dtype=torch.bool, device=targets.device)
    enough = tolerance * targets.norm(dim=1)
    for j in range(k):
        live &= rest.norm(dim=1) > enough
        if not live.any():
            break
        score = (rest @ unit.T).abs_().scatter_(1, ids[:, :j], -1.0)
        pick = score.argmax(dim=1)
        new = unit[pick]
        shares = torch.bmm(basis[:, :j], new[:, :, None])
        new = new - torch.bmm(shares.mT, basis[:, :j])[:, 0]
        again = torch.bmm(basis[:, :j], new[:, :, None])  # once more: the first time leaves rounding behind
        new = new - torch.bmm(again.mT, basis[:, :j])[:, 0]
        length = new.norm(dim=1)
        live &= length > DEPENDENT
        ids[:, j] = torch.where(live, pick, ids[:, 0])
        upper[:, :j, j] = torch.where(live[:, None], (shares + again)[:, :, 0], 0.0)
        upper[:, j, j] = torch.where(live, length, 1.0)
        basis[:, j] = torch.where(live[:, None], new / length.clamp(min=DEPENDENT)[:, None], 0.0)
        rest = rest - (basis[:, j] * rest).sum(dim=1, keepdim=True) * basis[:, j]
    heights = torch.bmm(basis, targets[:, :, None])
    return ids, torch.linalg.solve_triangular(upper, heights, upper=True)[:, :, 0]
