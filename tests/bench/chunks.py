"""A plug-in step for the table of ideas: `distill`, and a target for every stretch of text between shared boundaries.

Where the student needs several tokens for what lies between two shared boundaries, the probability that the teacher
gave to that stretch is matched by the product of the student's: binary cross-entropy of "this text, or another", as in
approximate likelihood matching (Minixhofer, Vulić and Ponti 2025, arXiv:2503.20083).
"""

from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "model"


def chunks(
    job: "Job",
    *,
    out: str,
    model: str,
    targets: list[str],
    data: str,
    weight: float = 0.5,
    lm_weight: float = 0.5,
    max_length: int = 512,
    train: dict[str, Any] | None = None,
) -> None:
    """The model after `distill` with min_ce and forward_kl, and `weight` times the loss of stretches a label."""
    import torch

    from fusion import _training, words
    from fusion._causal import split_head
    from fusion.join import Join, teachers
    from fusion.losses._rows import Fold
    from fusion.trainers import Objective
    from fusion.windows import IGNORED

    def lesson(tokenizer: Any, source: Any) -> Any:
        found = teachers(job, targets, tokenizer, source, "first_piece", "auto", False, False)
        folds = Fold.cat([Fold.build(teacher.map.student_index) for teacher in found])
        objective = Objective(words.load("losses", "forward_kl"), "sampled", folds, lm_weight, True, 1.0, 256)
        return Stretched(Join(found, words.load("fuse", "min_ce"), {})), objective

    def both(network: Any, objective: Any) -> None:
        plain_learn(network, objective)
        plain = network.forward

        def forward(self: Any, *args: Any, lesson: Any = None, counts: Any = None, **inputs: Any) -> Any:
            if lesson is None:
                return plain(*args, **inputs)
            of, log_p = lesson.pop("stretch_of"), lesson.pop("stretch_bits").view(torch.float32)
            loss, sums = plain(lesson=lesson, counts=counts)
            if len(log_p):
                decoder, head = split_head(self)
                names = [name for name in ("input_ids", "position_ids", "attention_mask") if name in lesson]
                hidden = decoder(**{name: lesson[name] for name in names}, use_cache=False).last_hidden_state
                labels = torch.nn.functional.pad(lesson["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
                at = (of >= 0).nonzero()[:, 0]  # of[p]: the stretch that the token predicted at p belongs to
                nll = torch.nn.functional.cross_entropy(head(hidden.flatten(0, 1)[at]), labels[at], reduction="none")
                log_q = torch.zeros(len(log_p)).index_add(0, of[at], -nll).clamp(max=-1e-4)
                p, q = log_p.exp(), log_q.exp()
                binary = -(p * log_q + (1 - p) * torch.log1p(-q))
                loss = loss + weight * binary.sum() / counts[0]
            return loss, sums

        network.forward = MethodType(forward, network)

    plain_learn = _training.learn_in_forward
    _training.learn_in_forward = both
    try:
        _training.learn(
            job, model=model, data=data, max_length=max_length, pack=True, train=train or {}, peft=None, lesson=lesson
        )
    finally:
        _training.learn_in_forward = plain_learn


class Stretched:
    """A join that also says which stretch each position predicts a part of, and what the teacher gave to it."""

    def __init__(self, join: Any):
        self.join = join

    def check(self, windows: Any, place: str) -> None:
        self.join.check(windows, place)

    def batch(self, windows: Any, places: Any, width: int) -> dict[str, Any]:
        import torch

        of, logs = np.full(width * (1 + max(row for _, row, _ in places)), -1, np.int64), []
        for piece, row, column in places:
            for rows, log_p in self.stretches(windows, piece):
                of[row * width + column + rows - piece.start - 1] = len(logs)  # position p predicts token p + 1
                logs.append(log_p)
        bits = torch.tensor(logs, dtype=torch.float32).view(torch.int32)
        found = self.join.batch(windows, places, width)
        return found | {"stretch_of": torch.from_numpy(of), "stretch_bits": bits}

    def stretches(self, windows: Any, piece: Any) -> Any:
        """(rows of the student's tokens, the teacher's log-probability) of each stretch of two tokens or more."""
        from alignment.tokens import shared_boundaries
        from fusion.join import quality

        digest = windows.digests[piece.document]
        heard = [teacher.store[digest] for teacher in self.join.teachers if digest in teacher.store]
        if not heard:
            return
        said = min(heard, key=lambda one: quality(one)[0])
        i, j = shared_boundaries(windows.ends(piece.document), said.ends)
        for a, b, c, d in zip(i[:-1], i[1:], j[:-1], j[1:]):
            nats = said.nll[c + 1 : d + 1]
            if b - a > 1 and piece.start < a + 1 and b + 1 <= piece.stop and np.isfinite(nats).all():
                yield np.arange(a + 1, b + 1), -float(nats.sum())
