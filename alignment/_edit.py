"""The published string maps: exact and minimum edit distance."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignment._first import lowest_ids, specials
from alignment._pieces import pieces


def exact_ids(teacher: Any, student: Any) -> tuple[np.ndarray, np.ndarray]:
    """Teacher id -> lowest student id of the same bytes (a byte-fallback piece counts only where no other has the
    byte), and student id -> that id where it is the counterpart of something; else -1."""
    give, take = pieces(teacher), pieces(student)
    lowest = lowest_ids(take)
    down = np.array([lowest.get(data, -1) if data else -1 for data in give.text], dtype=np.int64)
    for index, counterpart in specials(teacher, student).items():
        down[index] = counterpart
    present = {data for data in give.text if data}
    across = np.array([lowest[data] if data and data in present else -1 for data in take.text], dtype=np.int64)
    reached = sorted({target for target in specials(teacher, student).values() if target >= 0})
    across[reached] = reached
    return down, across


def nearest_ids(teacher: Any, student: Any) -> np.ndarray:
    """Teacher id -> student id at the least Levenshtein distance of bytes, the lowest of several; specials by role."""
    give, take = pieces(teacher), pieces(student)
    down, _ = exact_ids(teacher, student)
    buckets = _by_length(lowest_ids(take))
    for index, data in enumerate(give.text):
        if data and down[index] < 0:
            down[index] = _nearest(np.frombuffer(data, np.uint8), buckets)
    return down


def _by_length(candidates: dict[bytes, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Length -> ids (C,) ascending and bytes (C, length)."""
    groups: dict[int, list[tuple[int, bytes]]] = {}
    for data, index in sorted(candidates.items(), key=lambda item: item[1]):
        groups.setdefault(len(data), []).append((index, data))
    return {
        length: (
            np.array([index for index, _ in members], dtype=np.int64),
            np.frombuffer(b"".join(data for _, data in members), np.uint8).reshape(-1, length),
        )
        for length, members in groups.items()
    }


def _nearest(data: np.ndarray, buckets: dict[int, tuple[np.ndarray, np.ndarray]]) -> int:
    best, chosen = len(data) + max(buckets, default=0) + 1, -1
    # strings are at least as far apart as their lengths differ: near lengths first, and stop where none can win or tie
    for length in sorted(buckets, key=lambda n: abs(n - len(data))):
        if abs(length - len(data)) > best:
            break
        ids, candidates = buckets[length]
        distances = _distances(data, candidates)
        least = int(distances.min())
        first = int(ids[int(np.argmin(distances))])
        if least < best or (least == best and first < chosen):
            best, chosen = least, first
    return chosen


def _distances(data: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Levenshtein distances (C,) from data (n,) to candidates (C, m), one row of the table at a time for all candidates
    at once."""
    count, length = candidates.shape
    columns = np.arange(length + 1, dtype=np.int16)
    row = np.broadcast_to(columns, (count, length + 1))
    for step, byte in enumerate(data, start=1):
        ahead = np.empty((count, length + 1), np.int16)
        ahead[:, 0] = step
        np.minimum(row[:, :-1] + (candidates != byte), row[:, 1:] + 1, out=ahead[:, 1:])
        # insertions run along the row: min over k <= j of ahead[k] + (j - k)
        row = np.minimum.accumulate(ahead - columns, axis=1) + columns
    return row[:, -1]
