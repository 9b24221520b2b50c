"""Texts cut into pieces, and the order and slice of them that a data entry takes."""

import hashlib
import re
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def cut(text: str, max_bytes: int) -> list[tuple[int, int]]:
    """Consecutive (start, end) in characters, each at most `max_bytes` of UTF-8.

    A piece ends after a blank line, else a line, else a space, else a character. Pieces tile the text, so that every
    model reads the same ones and nothing is lost.
    """
    ends = None if text.isascii() else _byte_ends(text)  # (characters + 1,)
    pieces, start = [], 0
    while start < len(text):
        reach = start + max_bytes if ends is None else bisect_right(ends, ends[start] + max_bytes) - 1
        stop = min(len(text), max(start + 1, reach))
        if stop < len(text):
            for mark in ("\n\n", "\n", " "):
                found = text.rfind(mark, start + (stop - start) // 2, stop)
                if found >= 0:
                    stop = found + len(mark)
                    break
        pieces.append((start, stop))
        start = stop
    return pieces


def parse_split(split: str | None, count: int, place: str) -> slice:
    """The slice that `train[10%:90%]`, `train[:500]` or `train` takes of `count` documents."""
    match = re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split or "train")
    if match is None:
        raise ValueError(f"{place}.split: {split!r} is not like 'train', 'train[:95%]' or 'train[100:200]'")
    first, last = (
        None if v is None else round(count * int(v[:-1]) / 100) if v[-1] == "%" else int(v) for v in match.groups()
    )
    return slice(first, last)


def _byte_ends(text: str) -> "np.ndarray":
    """The offset in UTF-8 of every character, and of the text's end."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.concatenate([[0], np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])


def shuffled(table: "np.ndarray", seed: int | None) -> "np.ndarray":
    """The rows in the order of a hash of (seed, row number): the same on every machine, whatever is drawn elsewhere."""
    if seed is None:
        return table
    keys = [hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest() for row in range(len(table))]
    return table[sorted(range(len(table)), key=keys.__getitem__)]
