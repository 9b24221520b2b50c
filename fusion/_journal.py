"""What a trainer writes: its journal, checkpoints that are whole, and in the end the model."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fusion.trainers import DistillTrainer

if TYPE_CHECKING:
    from fusion.job import Job

SAVED = "saved"  # the file a rank leaves in a checkpoint it has finished


class Journal(TrainerCallback):
    """Writes what the trainer logs to the step's log.jsonl and moves the progress bar."""

    def __init__(self, job: "Job", advance: Callable[[int], None], tokens_per_step: float, language: bool = True):
        self.language = language  # whether the loss is that of language modelling
        self.log, self.place, self.advance, self.tokens_per_step = job.log, job.place, advance, tokens_per_step
        self.trainer: Trainer | None = None
        self.clock, self.at = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock, self.at = time.perf_counter(), state.global_step
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        record = dict(logs or {})
        for name in ("loss", "grad_norm"):
            if name in record and not math.isfinite(record[name]):
                raise ValueError(
                    f"{self.place}: the {name} is {record[name]} at step {state.global_step}; a lower learning_rate or "
                    f"a warm-up usually helps (checkpoints before it are kept)"
                )
        trainer = self.trainer
        if isinstance(trainer, DistillTrainer) and trainer.sums is not None:
            lm, target, labels, targets = trainer.accelerator.reduce(trainer.sums, "sum").tolist()
            trainer.sums = None
            record |= {"lm_loss": lm / max(labels, 1), "target_loss": target / max(targets, 1)}
            record |= {"target_share": targets / max(labels, 1)}
        elif "loss" in record and self.language:
            record["lm_loss"] = record["loss"]
        if state.global_step > self.at:
            seconds = (time.perf_counter() - self.clock) / (state.global_step - self.at)
            record["seconds_per_step"] = seconds
            if self.tokens_per_step:
                record["tokens_per_second"] = self.tokens_per_step / seconds
            self.clock, self.at = time.perf_counter(), state.global_step
        if "loss" in record:
            self.log(step=state.global_step, **record)


class Saved(TrainerCallback):
    """Marks a checkpoint as whole: a file a rank, which lists what all ranks have written."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(SAVED)]
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(files)}
        mark = folder / f"{SAVED}-{args.process_index}-of-{args.world_size}"
        partial = mark.with_name(f"{SAVED}.{args.process_index}")
        partial.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        partial.replace(mark)


def last_checkpoint(directory: Path, max_steps: int = -1) -> str | None:
    """The newest checkpoint all ranks have finished, as a path, or None; ValueError when it was damaged since.

    max_steps: where training ends, if positive; a checkpoint there is passed over, since the trainer would go on from
    it for one step too many.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for folder in found:
        if folder.name == f"checkpoint-{max_steps}":
            continue
        if mark := _whole(folder):
            _check_sizes(folder, json.loads(mark.read_text(encoding="utf-8")))
            return str(folder)
    return None


def _whole(folder: Path) -> Path | None:
    """The mark of a rank, when all ranks of that number have left theirs."""
    marks = sorted(folder.glob(f"{SAVED}-*"))
    return next((one for one in marks if len([*folder.glob(f"{SAVED}-*-of-{_ranks(one)}")]) == _ranks(one)), None)


def _ranks(mark: Path) -> int:
    return int(mark.name.rsplit("-", 1)[1])


def refuse_other_ranks(checkpoint: str | None, trainer: Trainer) -> None:
    """ValueError when ZeRO would have to go on with another number of processes than its shards were saved by."""
    if checkpoint is None or not trainer.is_deepspeed_enabled:
        return
    mark, here = _whole(Path(checkpoint)), trainer.args.world_size
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    assert mark is not None
    if _ranks(mark) != here and not config.get("checkpoint", {}).get("load_universal", False):
        raise ValueError(
            f"{checkpoint} was saved by {_ranks(mark)} processes, and ZeRO's shards fit no other number ({here} here); "
            f"launch as many, or make it universal (docs/launch.md, When something ends early)"
        )


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """ValueError naming a file that is gone or cut off: a trainer would go on without it, or end somewhere inside."""
    for name, written in sizes.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != written:
            now = "is gone" if size is None else f"has {size} bytes"
            raise ValueError(f"{file} {now}, {written} were written; delete {folder} to go on from an earlier one")


def leave(job: "Job", trainer: Trainer, tokenizer: Any, use_cache: bool, merge: bool) -> None:
    """Puts the trained model, with its own forward and any adapter merged into it, in the step's directory."""
    if merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    vars(trainer.model).pop("forward", None)
    trainer.model.config.use_cache = use_cache
    save(trainer, tokenizer, job.directory)


def save(trainer: Trainer, tokenizer: Any, directory: Path) -> None:
    """Writes the trained model (safetensors) and tokenizer; rank 0 removes the training checkpoints."""
    if trainer.is_deepspeed_enabled and not is_deepspeed_zero3_enabled():
        # Every rank holds all weights, but the trainer would clone each and so write tied ones twice.
        if trainer.args.should_save:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(directory)
    else:
        trainer.save_model(str(directory))
    if trainer.args.should_save:
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it stands in step.json
        if not list(directory.glob("*.safetensors")):
            raise ValueError("the launch configuration saves shards only; set zero3_save_16bit_model: true in it")
        tokenizer.save_pretrained(directory)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
