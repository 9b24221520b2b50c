"""Continued training: language modelling, supervised fine-tuning, preferences, rewards; with online merging or not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "model"


def files(fields: Mapping[str, Any]) -> list[str]:
    """Files that the result depends on besides models and data: the rewards' sources."""
    from fusion._tune_check import reward_files

    return reward_files(fields)


def check(view: "View") -> None:
    """Raises ValueError for data that the algorithm can't learn from, for rewards and for online merging that can't
    be meant; `plan` calls it."""
    from fusion._tune_check import check as checked

    checked(view)


def tune(
    job: "Job",
    *,
    out: str,
    model: str,
    data: str,
    algorithm: Literal["clm", "sft", "dpo", "kto", "reward", "grpo", "rloo"] = "clm",
    max_length: int = 512,
    pack: bool = True,
    rewards: list[str] | None = None,
    online_merge: dict[str, Any] | None = None,
    merge_with: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
) -> None:
    """The model after `clm` (language modelling by transformers.Trainer, on the rows a distill step would see), `sft`
    (TRL's SFTTrainer on texts or conversations), or TRL's trainer for preferences (`dpo`, `kto`), for a model that
    scores (`reward`) or for `rewards` of its own completions (`grpo`, `rloo`).

    online_merge: {base, reference, method, alpha, density, ...} of OnlineMergeCallback, base and reference being models
    of the recipe; the reference is `model` when left out. merge_with: {model, every, weight, method, ...} of
    MergeWithCallback: every so many steps the network is merged with a model of the recipe; or {groups, every, method,
    ...} of MergeGroupsCallback: each process trains a network of its own, and those are merged.
    """
    from fusion._training import follow, learn

    callbacks = [*meeting(job, merge_with or {}), *(merging(job, model, online_merge) if online_merge else [])]
    if (merge_with or {}).get("groups"):  # the loss of a group is its own: no other group's tokens count in it
        train = {"average_tokens_across_devices": False, **(train or {})}
    if online_merge and peft and algorithm in ("dpo", "kto"):  # what lies below the adapter is no reference for long
        train = {"precompute_ref_log_probs": True, **(train or {})}
    common: dict[str, Any] = {"model": model, "data": data, "max_length": max_length, "train": train or {}}
    common |= {"peft": peft, "callbacks": callbacks}
    if algorithm == "clm":
        learn(job, pack=pack, **common)
    elif algorithm == "sft":
        follow(job, **common)
    else:
        from fusion._preference import prefer

        prefer(job, algorithm=algorithm, rewards=rewards or [], **common)


def merging(job: "Job", model: str, settings: Mapping[str, Any]) -> list[Any]:
    """The callback that merges online. The reference is read from its files, so a resumed run has it too."""
    from fusion.online import OnlineMergeCallback

    given = {"seed": job.seed, **settings}
    given["base"] = job.source(settings["base"])
    given["reference"] = job.source(settings.get("reference") or model)
    return [OnlineMergeCallback(**given)]


def meeting(job: "Job", settings: Mapping[str, Any]) -> list[Any]:
    """The callback that merges with another model, or groups of ranks, every so many steps, if that is asked for."""
    from fusion.online import MergeGroupsCallback, MergeWithCallback

    kind = MergeGroupsCallback if settings.get("groups") else MergeWithCallback
    models = {name: job.source(settings[name]) for name in ("model", "base") if settings.get(name)}
    return [kind(**{"seed": job.seed, **settings, **models})] if settings else []


def train_fields(algorithm: str = "clm") -> set[str]:
    """The names that `train:` may hold, by algorithm."""
    from dataclasses import fields

    if algorithm == "clm":
        from transformers import TrainingArguments

        return {field.name for field in fields(TrainingArguments)}
    if algorithm == "sft":
        from trl import SFTConfig

        return {field.name for field in fields(SFTConfig)}
    from fusion._preference import kinds

    return {field.name for field in fields(kinds(algorithm)[1])}
