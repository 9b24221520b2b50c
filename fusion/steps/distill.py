"""Teach a model what recorded teachers said.

FuseLLM's idea (Wan et al. 2024, arXiv:2401.10491) with targets at shared byte boundaries, sampled from the teacher by
default (Anshumann et al. 2025, arXiv:2503.16870), and the language-model loss whole wherever no target stands.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"


def distill(
    job: "Job",
    *,
    out: str,
    model: str,
    targets: list[str],
    data: str,
    fuse: str | dict[str, Any] = "min_ce",
    loss: str | dict[str, Any] = "forward_kl",
    vocab: Literal["first_piece", "exact", "minimum_edit"] = "first_piece",
    direction: Literal["auto", "teacher", "student"] = "auto",
    inner: bool = False,
    lm_weight: float = 0.5,
    lm_everywhere: bool = True,
    max_length: int = 512,
    chunk: int = 256,
    pack: bool = True,
    train: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
) -> None:
    """The model after training on its text and on what the teachers of `targets` (stores of `record`) said about it.

    Where a target stands the loss is `lm_weight` of the language-model loss and the rest of the divergence, elsewhere
    the language-model loss; `lm_everywhere: false` weighs it by `lm_weight` at every position, as FuseLLM does.
    """
    from functools import partial

    from fusion import words
    from fusion._training import learn
    from fusion.join import Join, teachers
    from fusion.losses._rows import Fold
    from fusion.trainers import Objective

    rule, rule_parameters = words.parse("fuse", fuse, f"{job.place}.fuse")
    divergence, parameters = words.parse("losses", loss, f"{job.place}.loss")
    temperature = parameters.pop("temperature", 1.0)  # tempers the logits, which the divergence sees afterwards

    def lesson(tokenizer: Any, source: Path) -> tuple[Join, Objective]:
        common = not words.find("fuse", rule).constants.get("SELECTS", False)
        found = teachers(job, targets, tokenizer, source, vocab, direction, inner, common)
        kind = mixed_kind([t.store.kind for t in found], rule, divergence, job.place)
        folds = [Fold.build(teacher.map.student_index) for teacher in (found[:1] if common else found)]
        objective = Objective(
            partial(words.load("losses", divergence), **parameters),
            kind,
            Fold.cat(folds),
            lm_weight,
            lm_everywhere,
            temperature,
            chunk,
        )
        return Join(found, words.load("fuse", rule), rule_parameters), objective

    learn(
        job,
        model=model,
        data=data,
        max_length=max_length,
        pack=pack,
        train=train or {},
        peft=peft,
        lesson=lesson,
    )


def check(view: "View") -> None:
    """Raises ValueError for a weight that is no share, and for a fusion rule or a loss that has no use for draws where
    draws are recorded; `plan` calls it."""
    from fusion import words

    weight = view.fields["lm_weight"]
    if not 0 <= weight <= 1:
        raise ValueError(f"{view.place}.lm_weight: {weight} is not a share; it goes from 0 to 1")
    rule, _ = words.parse("fuse", view.fields["fuse"], f"{view.place}.fuse")
    divergence, _ = words.parse("losses", view.fields["loss"], f"{view.place}.loss")
    stores = [view.outputs[name] for name in view.fields["targets"]]
    kept = ("top_k", "nucleus")  # whether these are whole or truncated hangs on the teacher's vocabulary
    if all(one.step.verb == "record" and not any(one.fields.get(name) for name in kept) for one in stores):
        mixed_kind(["sampled"] * len(stores), rule, divergence, view.place)


def mixed_kind(kinds: list[str], rule: str, divergence: str, place: str) -> str:
    """The kind of the fused targets; ValueError where rule or divergence has no unbiased estimate from such targets."""
    from fusion import words

    if len(set(kinds)) == 1:
        kind = kinds[0]
    else:  # draws estimate every probability, a list knows some: no rule has a use for both at once
        kind = "mixed" if "sampled" in kinds else "truncated"
    for room, word in (("fuse", rule), ("losses", divergence)):
        allowed = words.find(room, word).constants["TARGETS"]
        if kind not in allowed:
            raise ValueError(
                f"{place}: {word} has no unbiased estimate from {kind} targets ({', '.join(kinds)}); "
                f"it takes {', '.join(allowed)}: record the stores by one such rule"
            )
    return kind


def train_fields() -> set[str]:
    """The names that `train:` may hold."""
    from dataclasses import fields

    from transformers import TrainingArguments

    return {field.name for field in fields(TrainingArguments)}
