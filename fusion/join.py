"""What the teachers said where the student predicts: stores, byte boundaries, vocabulary maps and a fusion rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from alignment.inner import Inner
from alignment.tokens import shared_boundaries
from alignment.vocab import VocabMap
from fusion._causal import Piece
from fusion.losses._rows import Rows
from fusion.targets import DocumentTargets, Store

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.windows import Windows

Rule = Callable[..., Rows]


@dataclass(frozen=True)
class Teacher:
    """One store and the map from its vocabulary to buckets, which are numbered from `first` on."""

    name: str
    store: Store
    map: VocabMap
    first: int = 0
    inner: Inner | None = None  # to draw on what it said inside its own tokens, too


def teachers(
    job: "Job",
    names: Sequence[str],
    tokenizer: Any,
    student: Path,
    vocab: str,
    direction: str,
    inner: bool,
    common: bool,
) -> list[Teacher]:
    """The stores of a distill step, each with the map of its vocabulary into buckets.

    With `common` these are the same for all teachers, else each has its own, numbered one after the other.

    `vocab` is a constructor of VocabMap, `direction` is for first_piece; `inner` asks for targets inside their tokens.
    Raises ValueError where that is asked of truncated targets: what goes on from a prefix may be in their tails.
    """
    from fusion.sources import header, load_tokenizer

    width = header(student).config["vocab_size"]
    stores = [Store.open(job.store(name)) for name in names]
    maps = []
    for store in stores:
        theirs = load_tokenizer(store.path / "tokenizer")
        sizes = {"teacher_size": store.header.vocabulary, "student_size": width}
        if vocab == "first_piece":
            maps.append(VocabMap.first_piece(theirs, tokenizer, direction=direction, **sizes))
        else:
            build = {"exact": VocabMap.exact, "minimum_edit": VocabMap.minimum_edit}[vocab]
            maps.append(build(theirs, tokenizer, **sizes))
    if common and len(maps) > 1:
        maps = VocabMap.join(maps)
    found = []
    for m, (name, store, map) in enumerate(zip(names, stores, maps, strict=True)):
        if inner and store.kind == "truncated":
            raise ValueError(
                f"{job.place}.inner: {name} holds truncated targets; record draws, or the whole distribution"
            )
        inside = Inner(load_tokenizer(store.tokenizer), tokenizer, map.student_index) if inner else None
        found.append(Teacher(name, store, map, 0 if common else m * map.size, inside))
    return found


class Heard(NamedTuple):
    """One teacher's targets on one piece of a document: n student rows, their E entries (bucket -1: none), tails."""

    rows: np.ndarray  # (n,)
    owner: np.ndarray  # (E,) the row of each entry, 0..n-1
    bucket: np.ndarray  # (E,)
    log_probs: np.ndarray  # (E,)
    tail: np.ndarray  # (n,)
    quality: tuple[float, float]  # nats per byte, nats per token of the teacher on the whole document


class Join:
    """Targets for batches of student rows.

    At every byte boundary that student and teacher share (end of student token i and of teacher token j), teacher row
    j+1 becomes the target of student row i+1: both predict from the same bytes. Elsewhere there is no target.
    """

    def __init__(self, teachers: Sequence[Teacher], rule: Rule, parameters: Mapping[str, Any]):
        self.teachers, self.rule, self.parameters = list(teachers), rule, dict(parameters)

    def batch(
        self, windows: "Windows", places: Sequence[tuple[Piece, int, int]], width: int
    ) -> dict[str, torch.Tensor]:
        """target_at (n,) flat positions b * width + p whose logits predict the row; target_ids, target_bits (n, K) and
        tail_bits (n,): float32 log-probabilities as int32, since DeepSpeed casts floating inputs to the model's dtype.
        """
        heard: list[list[tuple[int, Heard]]] = [[] for _ in self.teachers]
        at, scores = [np.zeros(0, np.int64)], [np.zeros((2, len(self.teachers), 0), np.float32)]
        for piece, row, column in places:
            base = row * width + column - piece.start - 1  # row t is predicted by the logits at position t - 1
            score = np.full((2, len(self.teachers), 1), np.nan, np.float32)
            rows = [np.zeros(0, np.int64)]
            for m, teacher in enumerate(self.teachers):
                said = self.hear(teacher, windows, piece)
                if said is not None:
                    heard[m].append((base, said))
                    rows.append(said.rows)
                    score[:, m, 0] = said.quality
            union = np.unique(np.concatenate(rows))
            at.append(base + union)
            scores.append(np.repeat(score, len(union), axis=2))
        positions, quality = np.concatenate(at), torch.from_numpy(np.concatenate(scores, axis=2))
        each = [gather(positions, h, teacher) for h, teacher in zip(heard, self.teachers, strict=True)]
        fused = self.rule(each, quality[0], quality[1], **self.parameters)
        teaches = fused.present & (fused.ids >= 0).any(1)  # the language-model loss stays whole everywhere else
        fused = fused.select(teaches)
        return {
            "target_at": torch.from_numpy(positions)[teaches],
            "target_ids": fused.ids,
            "target_bits": fused.log_probs.float().contiguous().view(torch.int32),
            "tail_bits": fused.tail.float().contiguous().view(torch.int32),
        }

    def check(self, windows: "Windows", place: str) -> None:
        """ValueError when a teacher has not one target for these rows: then there is nothing to learn from it."""
        for teacher in self.teachers:
            read = [digest for digest in windows.digests if digest in teacher.store]
            if not read:
                raise ValueError(
                    f"{place}.targets: '{teacher.name}' has read none of the {len(windows.digests)} documents; "
                    f"record it on the same data, with the same max_bytes"
                )
            heard = (self.hear(teacher, windows, piece) for row in windows.rows for piece in row)
            if not any(said is not None and len(said.rows) for said in heard):
                raise ValueError(
                    f"{place}.targets: the tokens of '{teacher.name}' and of the student share no byte boundary in any "
                    f"of {len(read)} documents, so that no target can be used"
                )

    def hear(self, teacher: Teacher, windows: "Windows", piece: Piece) -> Heard | None:
        """What the store has for the learnt tokens of a piece, None when it has not read the document."""
        digest = windows.digests[piece.document]
        if digest not in teacher.store:
            return None
        said = teacher.store[digest]
        i, j = shared_boundaries(windows.ends(piece.document), said.ends)
        inside = (i + 1 > piece.start) & (i + 1 < piece.stop) & (j + 1 < len(said.ids))
        rows, theirs = i[inside] + 1, j[inside] + 1
        counts = said.offsets[theirs + 1] - said.offsets[theirs]
        useful = (counts > 0) & windows.learnt(piece.document)[rows]
        rows, theirs, counts = rows[useful], theirs[useful], counts[useful]
        owner = np.repeat(np.arange(len(rows)), counts)
        entry = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner] + said.offsets[theirs][owner]
        bucket = teacher.map.index.numpy()[said.entry_ids[entry]]
        heard = Heard(rows, owner, bucket, said.entry_log_probs[entry], said.tail[theirs], quality(said))
        return heard if teacher.inner is None else between(heard, teacher.inner, windows, piece, said)


def between(heard: Heard, inner: Inner, windows: "Windows", piece: Piece, said: DocumentTargets) -> Heard:
    """`heard`, and targets for the student's boundaries that lie inside the teacher's tokens."""
    ends = windows.ends(piece.document)
    learnt = windows.learnt(piece.document)
    begin = np.concatenate([[0], said.ends[:-1]])
    at = np.arange(max(piece.start, 0), piece.stop - 1)  # the boundary is the end of this token, its row the next one
    at = at[(ends[at] > np.concatenate([[0], ends])[at]) & learnt[at + 1]]
    theirs = np.searchsorted(said.ends, ends[at], side="right")
    alone = (theirs < len(said.ids)) & ~np.isin(ends[at], said.ends)
    rows: list[int] = []
    owner: list[np.ndarray] = []
    bucket: list[np.ndarray] = []
    log_probs: list[np.ndarray] = []
    for i, j in zip(at[alone], theirs[alone], strict=True):
        prefix = inner.prefix(int(said.ids[j]), int(ends[i] - begin[j]), int(said.ends[j] - begin[j]))
        span = slice(said.offsets[j], said.offsets[j + 1])
        if prefix is None or span.start == span.stop:
            continue
        rests = inner.rests(prefix, said.entry_ids[span])
        if not (rests >= 0).any():
            continue
        mass = said.entry_log_probs[span][rests >= 0]
        owner.append(np.full(len(mass), len(rows)))
        rows.append(i + 1)
        bucket.append(rests[rests >= 0])
        log_probs.append(mass - np.logaddexp.reduce(mass))
    if not rows:
        return heard
    return Heard(
        np.concatenate([heard.rows, rows]),
        np.concatenate([heard.owner, len(heard.rows) + np.concatenate(owner)]),
        np.concatenate([heard.bucket, *bucket]),
        np.concatenate([heard.log_probs, *log_probs]),
        np.concatenate([heard.tail, np.full(len(rows), -np.inf, np.float32)]),
        heard.quality,
    )


def quality(said: DocumentTargets) -> tuple[float, float]:
    """Nats per byte and nats per token of a teacher on a document's text; its end token is not text."""
    nll = said.nll[:-1] if len(said.ends) > 1 and said.ends[-1] == said.ends[-2] else said.nll
    nats, tokens = float(np.nansum(nll)), int(np.isfinite(nll).sum())
    return nats / max(int(said.ends[-1]), 1), nats / max(tokens, 1)


def gather(positions: np.ndarray, heard: Sequence[tuple[int, Heard]], teacher: Teacher) -> Rows:
    """One teacher's entries at the batch's positions (N,) ascending: equal buckets added, padded to the widest row.

    Mass of entries without a counterpart among the student's buckets joins the tail.
    """
    n, size = len(positions), teacher.map.size
    tail, present = np.full(n, -np.inf, np.float64), np.zeros(n, bool)
    rows, buckets, masses = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for base, said in heard:
        here = np.searchsorted(positions, base + said.rows)
        tail[here], present[here] = said.tail, True
        rows.append(here[said.owner])
        buckets.append(said.bucket)
        masses.append(np.exp(said.log_probs.astype(np.float64)))
    row, bucket, masses_all = np.concatenate(rows), np.concatenate(buckets), np.concatenate(masses)
    lost = bucket < 0
    with np.errstate(divide="ignore"):
        tail = np.logaddexp(tail, np.log(np.bincount(row[lost], weights=masses_all[lost], minlength=n)))
    key, inverse = np.unique(row[~lost] * size + bucket[~lost], return_inverse=True)
    mass = np.bincount(inverse, weights=masses_all[~lost], minlength=len(key))
    row, bucket = key // size, teacher.first + key % size
    counts = np.bincount(row, minlength=n)
    column = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    width = int(counts.max(initial=0))
    ids, log_probs = np.full((n, width), -1, np.int64), np.full((n, width), -np.inf, np.float32)
    ids[row, column], log_probs[row, column] = bucket, np.log(mass)
    present &= counts > 0  # a row whose entries all lost their bucket says nothing, and has no say in a fusion
    return Rows(
        ids=torch.from_numpy(ids),
        log_probs=torch.from_numpy(log_probs),
        tail=torch.from_numpy(tail.astype(np.float32)),
        kind=teacher.store.kind,
        present=torch.from_numpy(present),
    )
