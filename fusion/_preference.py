"""Learning from preferences and rewards by TRL's trainers: dpo, kto, reward, grpo, rloo."""

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from fusion import _rows, words
from fusion._journal import leave
from fusion._training import arguments, fit, fresh_state, lora
from fusion.sources import load_model, load_tokenizer

if TYPE_CHECKING:
    from fusion.job import Job

ONLINE = ("grpo", "rloo")  # these make their own completions


def prefer(
    job: "Job",
    *,
    model: str,
    data: str,
    algorithm: str,
    max_length: int,
    rewards: Sequence[str],
    train: Mapping[str, Any],
    peft: Mapping[str, Any] | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Trains a model by one of TRL's trainers and leaves it in the step's directory."""
    trainer_kind, config_kind = kinds(algorithm)
    source = job.model(model)
    tokenizer = load_tokenizer(source)
    if tokenizer.eos_token is None:
        raise ValueError(f"{job.place}.model: the tokenizer of {model} has no end token, which {algorithm} needs")
    rows = _rows.shared(job, data, algorithm)
    refuse_long(job, rows, tokenizer, algorithm, max_length)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar of TRL's own, while it asks the reference model
    known = {field.name for field in fields(config_kind)}
    settled: dict[str, Any] = {"max_length": max_length} if "max_length" in known else {}
    if algorithm == "dpo" and not peft and not train.get("sync_ref_model"):
        settled["precompute_ref_log_probs"] = True  # otherwise a second model stays in memory
    with fresh_state():
        args = arguments(config_kind, job.directory, job.seed, {**settled, **train})
        network = scorer(source, job.seed) if algorithm == "reward" else load_model(source, "float32")
        use_cache, padding = network.config.use_cache, network.config.get_text_config().pad_token_id
        given: dict[str, Any] = {"peft_config": lora(peft)} if peft else {}
        if algorithm in ONLINE:
            given["reward_funcs"] = [reward(word) for word in rewards]
        trainer = trainer_kind(
            model=network,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            **given,
        )
        repeats = args.num_generations * args.num_iterations if algorithm in ONLINE else 1
        fit(job, trainer, tokens_per_step=0.0, language=False, repeats=repeats)
        if algorithm != "reward":  # TRL lent it the tokenizer's; a scorer needs to know where a text ends
            network.config.get_text_config().pad_token_id = padding
            network.generation_config.pad_token_id = padding
        leave(job, trainer, load_tokenizer(source), use_cache, merge=bool(peft))
    if job.rank == 0:
        shutil.rmtree(job.directory / "rows")


def kinds(algorithm: str) -> tuple[Any, Any]:
    """TRL's trainer and its configuration."""
    import trl

    prefix = "Reward" if algorithm == "reward" else algorithm.upper()
    return getattr(trl, f"{prefix}Trainer"), getattr(trl, f"{prefix}Config")


def refuse_long(job: "Job", rows: Any, tokenizer: Any, algorithm: str, max_length: int) -> None:
    """ValueError when TRL would crop or drop rows, which it does without a word."""
    long = sum(
        any(_rows.tokens(tokenizer, text) + 1 > max_length for text in _rows.texts(row, algorithm))
        for row in job.progress(rows, f"{job.name}: lengths")
    )
    if long:
        what = "prompts" if algorithm in ONLINE else "rows"
        raise ValueError(
            f"{job.place}.max_length: {long} of {len(rows)} {what} have more than {max_length} tokens (with the end "
            f"token), and {algorithm} would crop or drop them; raise max_length or take them out of the data"
        )


def reward(word: str) -> Callable[..., list[float | None]]:
    """The function of a dotted word, which gets prompts, completions and the data's other columns by name."""
    function: Callable[..., list[float | None]] = words.load("steps", word)
    asked = inspect.signature(function).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in asked):
        raise ValueError(
            f"rewards: {word} has to take whatever else it is given: def "
            f"{function.__name__}(completions, **columns), a list of numbers, one for each completion"
        )
    return function


def scorer(directory: Path, seed: int) -> Any:
    """The model of a directory with one number for a text; a new head where it had another one, or none."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(directory),
            num_labels=1,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    body = f"{model.base_model_prefix}."
    lost = sorted(str(n) for n in [*info["missing_keys"], *info["mismatched_keys"]] if str(n).startswith(body))
    if lost:
        raise ValueError(f"{directory}: missing or misshapen in the checkpoint: {', '.join(lost[:5])} ({len(lost)})")
    return model
