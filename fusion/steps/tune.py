"""Continued training: the baseline that every fusion must beat."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "model"


def tune(
    job: "Job",
    *,
    out: str,
    model: str,
    data: str,
    algorithm: Literal["clm", "sft"] = "clm",
    max_length: int = 512,
    pack: bool = True,
    train: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
) -> None:
    """The model after `clm` (language modelling by transformers.Trainer, on the rows a distill step would see) or `sft`
    (TRL's SFTTrainer on texts or conversations)."""
    from fusion._training import follow, learn

    if algorithm == "clm":
        learn(job, model=model, data=data, max_length=max_length, pack=pack, train=train or {}, peft=peft)
    else:
        follow(job, model=model, data=data, max_length=max_length, train=train or {}, peft=peft)


def train_fields(algorithm: str = "clm") -> set[str]:
    """The names that `train:` may hold, by algorithm."""
    from dataclasses import fields

    if algorithm == "clm":
        from transformers import TrainingArguments

        return {field.name for field in fields(TrainingArguments)}
    from trl import SFTConfig

    return {field.name for field in fields(SFTConfig)}
