"""One vocabulary into another: teacher and student tokens in common buckets, distributions projected onto them.

At a shared boundary both models predict the same bytes, cut into different pieces. Two distributions can be compared
where both are folded onto buckets that are a function of those bytes. *First piece*: the shorter token is what the
longer one begins with, so
    direction "teacher"  a teacher token goes to the first piece of its bytes in the student's own tokenization. Right
                         where teacher tokens are the longer; where they are shorter (teacher "t", student "the") "t"
                         would claim that "the" is wrong;
    direction "student"  a student token goes to its first piece in the teacher's tokenization: right where student
                         tokens are the longer;
    direction "auto"     both at once: the connected components of the two maps, right on either side, at the price of
                         coarser buckets.
`exact` and `minimum_edit` are the published string maps (Wan et al. 2024, arXiv:2401.10491), here to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignment._edit import exact_ids, nearest_ids
from alignment._first import before_a_word, first_pieces, specials
from alignment._pieces import pieces
from alignment._project import project_rows

_DIRECTIONS = ("teacher", "student", "auto")


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Teacher ids and student ids -> buckets; a bucket is named by the id of one of its student tokens."""

    index: Tensor  # (V_teacher,) int64: teacher id -> bucket, -1 for the tail (no counterpart)
    student_index: Tensor  # (V_student,) int64: student id -> bucket, -1 for the tail
    size: int  # number of bucket ids: V_student

    @classmethod
    def first_piece(
        cls,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        direction: str = "auto",
        teacher_size: int | None = None,
        student_size: int | None = None,
    ) -> VocabMap:
        """The map by first piece. Special tokens map by role, other specials to the tail, and so do rows of a head (of
        `teacher_size`, `student_size` rows) beyond the vocabulary. Identical vocabularies give the identity.

        Raises ValueError where a head is smaller than its vocabulary.
        """
        if direction not in _DIRECTIONS:
            raise ValueError(f"direction {direction!r} is none of {', '.join(_DIRECTIONS)}")
        sizes = _sizes(teacher_tokenizer, student_tokenizer, teacher_size, student_size)
        if _identical(teacher_tokenizer, student_tokenizer):
            same = np.arange(len(pieces(teacher_tokenizer).text))
            return _map(same, same, sizes)
        down = first_pieces(teacher_tokenizer, student_tokenizer)
        if direction == "teacher":
            return _map(down, _identity(teacher_tokenizer, student_tokenizer), sizes)
        up = first_pieces(student_tokenizer, teacher_tokenizer)
        order = _by_length(student_tokenizer)
        if direction == "student":
            return _map(*_upwards(down, up, order), sizes)
        # runs of white space correspond one to one before a word, the longer to the shorter or the other way round
        for table, sides in (
            (down, (teacher_tokenizer, student_tokenizer)),
            (up, (student_tokenizer, teacher_tokenizer)),
        ):
            for index, first in before_a_word(*sides).items():
                table[index] = first
        return _map(*_components(down, up, order), sizes)

    @classmethod
    def exact(
        cls,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        teacher_size: int | None = None,
        student_size: int | None = None,
    ) -> VocabMap:
        """Tokens of equal bytes; all others are tail on both sides. Of several student tokens with the same bytes the
        lowest id counts."""
        sizes = _sizes(teacher_tokenizer, student_tokenizer, teacher_size, student_size)
        index, student_index = exact_ids(teacher_tokenizer, student_tokenizer)
        return _map(index, student_index, sizes)

    @classmethod
    def minimum_edit(
        cls,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        teacher_size: int | None = None,
        student_size: int | None = None,
    ) -> VocabMap:
        """Each teacher token to the student token at the smallest Levenshtein distance between their bytes, ties to the
        lowest id.

        A baseline, quadratic in the vocabularies: see docs/token_correspondence.md for its time. Not a function of the
        text's bytes, so biased by construction.
        """
        sizes = _sizes(teacher_tokenizer, student_tokenizer, teacher_size, student_size)
        index = nearest_ids(teacher_tokenizer, student_tokenizer)
        return _map(index, _identity(teacher_tokenizer, student_tokenizer), sizes)

    @classmethod
    def join(cls, maps: Sequence[VocabMap]) -> list[VocabMap]:
        """The maps of several teachers to one student, re-expressed on the finest buckets that every one of them can be
        folded onto.

        A student token is tail only where it is tail in all of them. Raises ValueError where the students differ in
        size.
        """
        if len({m.size for m in maps}) > 1:
            raise ValueError(f"maps onto students of {' and '.join(str(m.size) for m in maps)} tokens cannot be joined")
        if not maps:
            return []
        size = maps[0].size
        tables = [m.student_index.numpy() for m in maps]
        starts = np.concatenate([np.flatnonzero(table >= 0) for table in tables])
        stops = np.concatenate([table[table >= 0] for table in tables])
        label = _connected(starts, stops, size)
        # a token that already names a bucket goes on naming the joined one
        names = np.zeros(size, np.bool_)
        for table in tables:
            names[table[table >= 0]] = True
        root = _roots(label, np.argsort(~names, kind="stable"))[label]
        root[np.all([table < 0 for table in tables], axis=0)] = -1
        joined = torch.from_numpy(root)
        return [cls(torch.where(m.index >= 0, joined[m.index.clamp(min=0)], -1), joined, size) for m in maps]

    def project(self, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher entries of one row, ids (K,) and log_probs (K,), as buckets (B,) and log-masses (B,), the heaviest
        first.

        Mass on one bucket adds up. What maps to the tail is dropped: it is what the result lacks to 1.
        """
        buckets, masses = self.project_rows(ids[None], log_probs[None])
        keep = buckets[0] >= 0
        return buckets[0][keep], masses[0][keep]

    def project_rows(self, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """`project` for N rows: ids (N, K) with -1 as padding, log_probs (N, K); both (N, K) again, padded with -1 and
        -inf on the right."""
        index = self.index.to(ids.device)
        return project_rows(torch.where(ids >= 0, index[ids.clamp(min=0)], -1), log_probs)

    def save(self, path: str | Path) -> None:
        """Write the map as a safetensors file."""
        tensors = {"index": self.index.contiguous(), "student_index": self.student_index.clone()}
        save_file(tensors, str(path), metadata={"size": str(self.size)})

    @classmethod
    def load(cls, path: str | Path) -> VocabMap:
        """Read a map that `save` wrote."""
        with safe_open(str(path), framework="pt") as file:
            return cls(file.get_tensor("index"), file.get_tensor("student_index"), int(file.metadata()["size"]))


def _sizes(teacher: Any, student: Any, teacher_size: int | None, student_size: int | None) -> tuple[int, int]:
    sizes = []
    for name, tokenizer, size in (("teacher", teacher, teacher_size), ("student", student, student_size)):
        length = len(pieces(tokenizer).text)
        if size is not None and size < length:
            raise ValueError(f"the {name}'s tokenizer has {length} ids, but its head only {size} rows")
        sizes.append(length if size is None else size)
    return sizes[0], sizes[1]


def _map(index: np.ndarray, student_index: np.ndarray, sizes: tuple[int, int]) -> VocabMap:
    """Rows of a padded head beyond the vocabulary belong to the tail."""
    padded = [
        np.pad(table.astype(np.int64), (0, size - len(table)), constant_values=-1)
        for table, size in zip((index, student_index), sizes, strict=True)
    ]
    return VocabMap(torch.from_numpy(padded[0]), torch.from_numpy(padded[1]), sizes[1])


def _identical(teacher: Any, student: Any) -> bool:
    return pieces(teacher).spelling == pieces(student).spelling and pieces(teacher).text == pieces(student).text


def _identity(teacher: Any, student: Any) -> np.ndarray:
    """Every student token its own bucket, but specials that the teacher has no counterpart of."""
    table = pieces(student)
    index = np.array([-1 if data is None else i for i, data in enumerate(table.text)], dtype=np.int64)
    reached = {target for target in specials(teacher, student).values() if target >= 0}
    index[sorted(reached)] = sorted(reached)
    return index


def _by_length(student: Any) -> np.ndarray:
    """Student ids, shortest bytes first, then lowest id; specials, which begin nothing, last."""
    return np.argsort([1 << 30 if data is None else len(data) for data in pieces(student).text], kind="stable")


def _upwards(down: np.ndarray, up: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student tokens with one first piece in the teacher share a bucket; a teacher token that is nobody's goes where
    its own begins."""
    known = up >= 0
    roots = _roots(np.maximum(up, 0), order[known[order]], len(down))
    student_index = np.where(known, roots[np.maximum(up, 0)], -1)
    index = np.full(len(down), -1, np.int64)
    index[up[known]] = student_index[known]
    orphans = (index < 0) & (down >= 0)
    index[orphans] = student_index[down[orphans]]
    return index, student_index


def _components(down: np.ndarray, up: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The components of the graph of both maps, named by their shortest student token; those without both sides are
    tail."""
    teachers, students = len(down), len(up)
    starts = np.concatenate([np.flatnonzero(down >= 0), teachers + np.flatnonzero(up >= 0)])
    stops = np.concatenate([teachers + down[down >= 0], up[up >= 0]])
    label = _connected(starts, stops, teachers + students)
    both = np.intersect1d(label[:teachers], label[teachers:])
    root = np.full(label.max(initial=-1) + 1, -1, np.int64)
    root[both] = _roots(label[teachers:], order, len(root))[both]
    return root[label[:teachers]], root[label[teachers:]]


def _connected(starts: np.ndarray, stops: np.ndarray, nodes: int) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(starts), np.int8), (starts, stops)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1]


def _roots(label: np.ndarray, order: np.ndarray, count: int | None = None) -> np.ndarray:
    """For each label the first of its members in `order`, -1 for labels without any."""
    roots = np.full(count if count is not None else label.max(initial=-1) + 1, -1, np.int64)
    backwards = order[::-1]
    roots[label[backwards]] = backwards  # the last write stays, so the first in order
    return roots
