"""One document's targets as bytes and back: columns of small numbers, each deflated on its own.

Layout: a header, then the columns, each preceded by its compressed length (uint32). Ids are split into byte planes;
log-probabilities are whole steps of GRID nats and, since entries come in descending order, differences of these;
numbers that are mostly below 255 are single bytes, a byte of 255 meaning "and on". Each column takes the shorter of
deflate and Huffman coding alone: with code tables of their own they are 4 to 8 % shorter than in one stream.

Loss: token ids, entry ids and counts are exact. A log-probability comes back within GRID = 1/64 nats, of which half is
rounding and half comes from scaling each row so that entries and tail add up to 1 again. Log-probabilities below FLOOR
are stored as FLOOR. The log-likelihood of a token is a float16 (relative error 2**-11).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

FORMAT = 1
GRID = 1 / 64  # nats
FLOOR = -200.0  # nats; e**-200 is no probability anything can be learnt from
KINDS = ("sampled", "truncated", "whole")
_HEADER = struct.Struct("<BBBxIII")  # format, kind, planes of an id, draws, tokens, entries


@dataclass(frozen=True)
class DocumentTargets:
    """What a teacher said about one document, in the teacher's own tokens; row t is the prediction of token t.

    Row t owns the entries offsets[t]:offsets[t + 1], by descending log-probability and equal ones by ascending id.
    Row 0 and rows that were not recorded own none and have a NaN nll.
    """

    ids: np.ndarray  # (T,) int64, the document's tokens
    ends: np.ndarray  # (T,) int64, the byte at which each token ends
    nll: np.ndarray  # (T,) float32, nats of each token
    offsets: np.ndarray  # (T + 1,) int64
    entry_ids: np.ndarray  # (E,) int64
    entry_log_probs: np.ndarray  # (E,) float32; log(count / draws) when sampled, else true log-probabilities
    tail: np.ndarray  # (T,) float32 log of the mass outside the entries; -inf for none


def pack(targets: DocumentTargets, kind: str, draws: int, vocabulary: int) -> np.ndarray:
    """uint8 (bytes,) of one document. `draws` is 0 unless `kind` is sampled; ids must be below `vocabulary`."""
    planes = max(1, ((vocabulary - 1).bit_length() + 7) // 8)
    lengths = np.diff(targets.offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((targets.entry_ids, -targets.entry_log_probs, owner))
    ids, log_probs = targets.entry_ids[order], targets.entry_log_probs[order]
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < vocabulary)
    nll = np.clip(targets.nll, 0, 60000).astype(np.float16).view(np.uint16)
    columns = [*_planes(targets.ids, planes), _small(np.diff(targets.ends, prepend=0)), *_planes(nll, 2)]
    columns += _planes(ids, planes)
    if kind == "sampled":
        # counts of a row add up to `draws`, so a flag per row is enough to find where each row's entries end
        columns += [(lengths > 0).astype(np.uint8), _small(np.rint(np.exp(log_probs.astype(np.float64)) * draws) - 1)]
    else:
        steps = np.rint(np.maximum(log_probs, FLOOR) / -GRID).astype(np.int64)
        first = targets.offsets[:-1][lengths > 0]
        inner = np.ones(len(steps), bool)
        inner[first] = False
        tail = targets.tail[lengths > 0]
        tail_steps = np.where(np.isneginf(tail), 0, 1 + np.rint(np.clip(tail, FLOOR, 0) / -GRID))
        columns += [_small(lengths), _small(steps[first]), _small(np.diff(steps, prepend=0)[inner]), _small(tail_steps)]
    head = _HEADER.pack(FORMAT, KINDS.index(kind), planes, draws, len(targets.ids), len(ids))
    parts = [head]
    for column in columns:
        deflated = _deflate(column)
        parts += [struct.pack("<I", len(deflated)), deflated]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def unpack(data: np.ndarray) -> DocumentTargets:
    """The inverse of `pack`; ValueError for bytes of another format."""
    view = memoryview(data.tobytes())
    version, kind, planes, draws, tokens, entries = _HEADER.unpack_from(view)
    if version != FORMAT:
        raise ValueError(f"the targets of this document are in format {version}, this version of fusion reads {FORMAT}")
    at = _HEADER.size

    def column() -> np.ndarray:
        nonlocal at
        size = struct.unpack_from("<I", view, at)[0]
        start, at = at + 4, at + 4 + size
        return np.frombuffer(zlib.decompress(view[start:at], -15), dtype=np.uint8)

    ids = _join([column() for _ in range(planes)])
    ends = np.cumsum(_large(column()))
    nll = _join([column() for _ in range(2)]).astype(np.uint16).view(np.float16).astype(np.float32)
    entry_ids = _join([column() for _ in range(planes)])
    tail = np.full(tokens, -np.inf, np.float32)
    lengths = np.zeros(tokens, np.int64)
    if KINDS[kind] == "sampled":
        present = column().astype(bool)
        counts = 1 + _large(column())
        lengths[present] = np.bincount((np.cumsum(counts) - 1) // draws, minlength=int(present.sum()))
        log_probs = np.log(counts / draws)
    else:
        lengths = _large(column())
        present = lengths > 0
        first = (np.cumsum(lengths) - lengths)[present]
        steps = np.zeros(entries, np.int64)
        steps[first] = _large(column())
        inner = np.ones(entries, bool)
        inner[first] = False
        steps[inner] = _large(column())
        owner = np.repeat(np.arange(len(first)), lengths[present])
        running = np.cumsum(steps)
        steps = running - (running[first] - steps[first])[owner]  # each row starts again at its own first entry
        tail_steps = _large(column())
        row_tail = np.where(tail_steps == 0, -np.inf, (tail_steps - 1) * -GRID)
        log_probs = steps * -GRID
        mass = np.bincount(owner, weights=np.exp(log_probs), minlength=len(first)) + np.exp(row_tail)
        log_probs = log_probs - np.log(mass)[owner]
        tail[present] = row_tail - np.log(mass)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return DocumentTargets(ids, ends, nll, offsets, entry_ids, log_probs.astype(np.float32), tail)


def _planes(values: np.ndarray, count: int) -> list[np.ndarray]:
    wide = values.astype(np.int64)
    return [((wide >> (8 * plane)) & 255).astype(np.uint8) for plane in range(count)]


def _join(planes: list[np.ndarray]) -> np.ndarray:
    return sum(
        (plane.astype(np.int64) << (8 * n) for n, plane in enumerate(planes)), np.zeros(len(planes[0]), np.int64)
    )


def _small(values: np.ndarray) -> np.ndarray:
    """Numbers >= 0 as bytes: v // 255 bytes of 255, then v % 255."""
    wide = values.astype(np.int64)
    repeats = wide // 255 + 1
    out = np.full(int(repeats.sum()), 255, np.uint8)
    out[np.cumsum(repeats) - 1] = wide % 255
    return out


def _large(data: np.ndarray) -> np.ndarray:
    """The inverse of `_small`, int64."""
    total = np.cumsum(data, dtype=np.int64)[data != 255]
    return np.diff(total, prepend=0)


def _deflate(column: np.ndarray) -> bytes:
    found = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        found.append(stream.compress(column.tobytes()) + stream.flush())
    return min(found, key=len)
