"""What a teacher's distribution says at a boundary that only the student has, inside one of the teacher's tokens.

Between two of its boundaries a teacher is not asked again, but it has answered already: of all tokens it expected at
its last boundary, those that begin with the bytes read since then remain, and what they leave is its distribution over
the bytes to come. Draws that remain are draws from that conditional distribution. Two things make it an approximation:
paths on which the teacher would have written the same bytes in shorter tokens are left out, and a rest that ends inside
one of the student's tokens counts as its first piece.
"""

from typing import Any

import numpy as np
from torch import Tensor

from alignment._first import encoded_firsts
from alignment._pieces import pieces


class Inner:
    """Buckets of what is left of teacher tokens after a given prefix; asked again, it remembers."""

    def __init__(self, teacher_tokenizer: Any, student_tokenizer: Any, student_index: Tensor):
        self.text = pieces(teacher_tokenizer).text
        self.student = student_tokenizer
        self.index = student_index.numpy()
        self.known: dict[bytes, int] = {}

    def prefix(self, token: int, length: int, span: int) -> bytes | None:
        """The first `length` bytes of a teacher token that covers `span` bytes; None where its bytes are others."""
        data = self.text[token]
        return data[:length] if data is not None and len(data) == span else None

    def rests(self, prefix: bytes, ids: np.ndarray) -> np.ndarray:
        """(E,) buckets of the rests of teacher tokens `ids` (E,); -1 where a token does not go on from `prefix`."""
        found = [self.text[i] for i in ids]
        left = [d[len(prefix) :] if d and len(d) > len(prefix) and d.startswith(prefix) else b"" for d in found]
        new = sorted({rest for rest in left if rest and rest not in self.known})
        if new:
            for rest, first in zip(new, encoded_firsts(new, self.student), strict=True):
                self.known[rest] = int(self.index[first]) if first >= 0 else -1
        return np.array([self.known[rest] if rest else -1 for rest in left], np.int64)
