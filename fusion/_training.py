"""What every training step needs around its trainer: a clean process, rows, arguments, going on where it stopped."""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from fusion._causal import check_packing
from fusion._deepspeed import check_operators, forget_shared_memory, operators
from fusion._journal import Journal, Saved, last_checkpoint, leave, refuse_other_ranks
from fusion._ranks import Terminated
from fusion._sigterm import SaveAndStop, listening
from fusion.data import encode
from fusion.join import Join
from fusion.online.groups import MergeGroupsCallback
from fusion.sources import load_model, load_tokenizer
from fusion.trainers import DistillTrainer, Objective, learn_in_forward
from fusion.windows import Collator, windows

if TYPE_CHECKING:
    from fusion.job import Job


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()


@contextmanager
def fresh_state() -> Iterator[None]:
    """Clears what accelerate and transformers keep per process, before and after.

    Each training step has its own batch size, precision and DeepSpeed stage.
    """
    launcher = _accelerate()
    _reset()
    try:
        yield
    finally:
        _reset()
        for name in _accelerate().keys() - launcher.keys():
            del os.environ[name]  # of `deepspeed:` or `fsdp:` in this step's train, which would hold for the next, too
        os.environ.update(launcher)


def _accelerate() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


def arguments(kind: type[TrainingArguments], directory: Path, seed: int, train: Mapping[str, Any]) -> TrainingArguments:
    """The recipe's `train:` over the few defaults a recipe need not repeat."""
    fields: dict[str, Any] = {
        "output_dir": str(directory / "checkpoints"),
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "seed": seed,
    }
    if train.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        wait = check_operators(operators())
        if wait:
            print(wait, flush=True)
    args = kind(**(fields | dict(train)))
    args._n_gpu = min(args.n_gpu, 1)  # more devices come by launching more processes, never by torch's DataParallel
    if is_deepspeed_zero3_enabled():
        # Weights are sharded while they load, over the ranks that DeepSpeed knows of, before there is a trainer.
        import deepspeed

        deepspeed.init_distributed(verbose=False)
    if args.deepspeed_plugin is not None:
        forget_shared_memory()
    return args


def packs(directory: Path) -> str | None:
    """None when this architecture keeps packed documents apart, else the sentence that says why not.

    Tried on a freshly initialised twin of two layers, since the weights themselves may live in shards (ZeRO-3).
    """
    config = AutoConfig.from_pretrained(directory)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = min(2, text.num_hidden_layers), 64, None
    if "layer_types" in text.to_dict() and text.layer_types:
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return check_packing(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def learn(
    job: "Job",
    *,
    model: str,
    data: str,
    max_length: int,
    pack: bool,
    train: Mapping[str, Any],
    peft: Mapping[str, Any] | None,
    callbacks: Sequence[TrainerCallback] = (),
    lesson: Callable[[Any, Path], tuple[Join, Objective]] | None = None,
) -> None:
    """Trains a model on a data set and leaves it in the step's directory.

    With `lesson(tokenizer, model directory)` batches carry its targets and the loss is its objective; without, this is
    transformers.Trainer as it stands. Both see the same rows in the same order.
    """
    source = job.model(model)
    tokenizer = load_tokenizer(source)
    why_not = packs(source) if pack else None
    if why_not and job.rank == 0:
        print(why_not)
    rows = windows(
        job.directory / "tokens",
        tokenizer,
        lambda: job.progress(job.documents(data), f"{job.name}: tokens"),
        max_length,
        pack and why_not is None,
        job.rank,
        job.wait,
    )
    join, objective = lesson(tokenizer, source) if lesson else (None, None)
    if join is not None:
        join.check(rows, job.place)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with fresh_state():
        args = arguments(TrainingArguments, job.directory, job.seed, train)
        network = load_model(source, "float32")  # master weights; `bf16: true` in train computes in bfloat16
        use_cache, network.config.use_cache = network.config.use_cache, False  # a cache would undo the packing mask
        if peft:
            network = adapted(network, peft)
        if objective is not None:
            eager = not is_deepspeed_zero3_enabled() and not args.fsdp
            learn_in_forward(network, replace(objective, eager=eager, fold=objective.fold.to(args.device)))
        kind = Trainer if objective is None else DistillTrainer
        collator = Collator(rows, fill, join)
        trainer = kind(model=network, args=args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks))
        fit(job, trainer, tokens_per_step=rows.tokens / len(rows) * args.train_batch_size * args.world_size)
        leave(job, trainer, tokenizer, use_cache, merge=bool(peft))
    if job.rank == 0:
        shutil.rmtree(job.directory / "tokens")


def follow(
    job: "Job",
    *,
    model: str,
    data: str,
    max_length: int,
    train: Mapping[str, Any],
    peft: Any,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Supervised fine-tuning by TRL's SFTTrainer on texts or conversations, left in the step's directory."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    source = job.model(model)
    tokenizer = load_tokenizer(source)
    documents = list(job.documents(data))
    long = sum(len(encode(tokenizer, d).ids) > max_length for d in job.progress(documents, f"{job.name}: lengths"))
    if long:
        raise ValueError(
            f"{job.place}.max_length: {long} of {len(documents)} documents have more than {max_length} tokens, and SFT "
            f"would crop them; raise max_length or give the data a max_bytes"
        )
    texts = [{"text": d.text} if d.messages is None else {"messages": list(d.messages)} for d in documents]
    with fresh_state():
        args = arguments(SFTConfig, job.directory, job.seed, {"max_length": max_length, **train})
        network = load_model(source, "float32")
        use_cache = network.config.use_cache
        if peft:
            network = adapted(network, peft)
        rows = Dataset.from_list(texts)
        trainer = SFTTrainer(
            model=network, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks)
        )
        fit(job, trainer, tokens_per_step=0.0)
        leave(job, trainer, tokenizer, use_cache, merge=bool(peft))


def adapted(network: PreTrainedModel, peft: Mapping[str, Any]) -> Any:
    """The model with a LoRA adapter to train (Hu et al. 2021, arXiv:2106.09685); in the end it joins the weights."""
    from peft import get_peft_model

    return get_peft_model(network, lora(peft))


def lora(peft: Mapping[str, Any]) -> Any:
    """The recipe's `peft:` as PEFT's LoraConfig; ValueError where its adapter could not join the weights."""
    from peft import LoraConfig

    if is_deepspeed_zero3_enabled():
        raise ValueError("peft: an adapter can't be merged into weights that ZeRO-3 has sharded; launch with zero2")
    return LoraConfig(**{"task_type": "CAUSAL_LM", **peft})


def fit(job: "Job", trainer: Trainer, tokens_per_step: float, language: bool = True, repeats: int = 1) -> None:
    """Runs the trainer, from its last whole checkpoint if there is one, and writes log.jsonl and metrics.json.

    language: the loss is that of language modelling. repeats: how often an epoch sees each row.
    Raises Terminated on every rank, with a checkpoint on disk, when SIGTERM reached any of them.
    """
    checkpoint = last_checkpoint(Path(trainer.args.output_dir), trainer.args.max_steps)
    refuse_other_ranks(checkpoint, trainer)
    _forget(job.directory / "log.jsonl", 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1]), job.rank)
    args = trainer.args
    if args.world_size != job.world:
        raise ValueError(
            f"{job.place}: {job.world} processes were launched, and the trainer knows of {args.world_size}; see "
            f"docs/launch.md, What silently goes wrong"
        )
    batches = math.ceil(len(trainer.train_dataset) * repeats / (args.train_batch_size * args.world_size))
    epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    with job.progress(steps, job.name) as bar:
        journal = Journal(job, bar.advance, tokens_per_step * args.gradient_accumulation_steps, language)
        journal.trainer = trainer
        trainer.remove_callback(PrinterCallback)  # log.jsonl has it
        stop = SaveAndStop()
        for callback in (journal, Saved(), stop):
            trainer.add_callback(callback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, MergeGroupsCallback):
                callback.trainer = trainer
        job.after.enter_context(listening(stop, job.name))  # till the step is done: what its last step made is saved
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()  # the first rank to leave ends the others, which may still save
    if stop.stopped:
        raise Terminated(f"{job.name}: SIGTERM, saved at step {trainer.state.global_step}; the same command continues")
    if job.rank == 0:
        wanted = ("train_loss", "train_runtime")
        metrics = {name: result.metrics[name] for name in wanted if name in result.metrics}
        metrics["steps"] = trainer.state.global_step
        job.measured(dict(sorted(metrics.items())))


def _forget(log: Path, step: int, rank: int) -> None:
    """Drops what was logged after the checkpoint that training goes on from, and a line that a kill cut off."""
    if rank == 0 and log.exists():
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
