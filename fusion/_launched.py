"""What a launcher has set up, and where something else than the recipe would be trained without a word: sentences.

Launchers speak to a process through its environment. What is wrong there is said before the first step starts, by
`fusion launch` even before there is a process; docs/launch.md has the table.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp16")
STEPS = "gradient_accumulation_steps"
# What accelerate replaces by DeepSpeed's CPU Adam without a change of its settings.
ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Launched:
    """A launch, as far as a training depends on it; the default is none, which is what planning knows."""

    world: int | None = None  # processes
    device: str = ""  # what this one computes on: cpu, cuda:1; "" when that isn't known yet
    deepspeed: Mapping[str, Any] | str | None = None  # DeepSpeed's configuration, or the file with it
    fsdp: bool = False
    kept_on_cpu: bool = False  # accelerate was told to stay on the CPU, which turns DeepSpeed off
    deepspeed_on_cpu: bool = False
    precision: str = "no"  # of accelerate's configuration


def of_environment(environ: Mapping[str, str], world: int, device: str) -> Launched:
    """The launch that this environment tells of."""
    return Launched(
        world,
        device,
        _deepspeed(environ) if _true(environ, "ACCELERATE_USE_DEEPSPEED") else None,
        _true(environ, "ACCELERATE_USE_FSDP"),
        _true(environ, "ACCELERATE_USE_CPU"),
        environ.get("DS_ACCELERATOR") == "cpu",
        environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    )


def told(settings: Mapping[str, Any]) -> dict[str, str]:
    """What accelerate's launcher puts into the environment for a configuration, as far as `of_environment` reads it."""
    kind, zero = str(settings["distributed_type"]), settings.get("deepspeed_config") or {}
    found = {
        "ACCELERATE_USE_DEEPSPEED": str(kind == "DEEPSPEED"),
        "ACCELERATE_USE_FSDP": str(kind == "FSDP"),
        "ACCELERATE_MIXED_PRECISION": str(settings.get("mixed_precision", "no")),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(zero.get(STEPS, "auto")),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": str(zero.get("offload_optimizer_device", "none")),
    }
    file = zero.get("deepspeed_config_file")
    return found if file is None else {**found, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def check_processes(environ: Mapping[str, str], world: int, device: str, devices: int) -> list[str]:
    """What to print about a launch; ValueError when its processes can't train together.

    devices: how many accelerators this process sees.
    """
    here = int(environ.get("LOCAL_WORLD_SIZE", 1))  # torch's launcher, which shows all devices to every process
    if device != "cpu" and here > devices:
        raise ValueError(
            f"{here} processes were started on this machine, and {devices} accelerator{'s are' * (devices > 1)}"
            f"{' is' * (devices < 2)} visible: each process needs one"
        )
    if world > 1 and environ.get("MASTER_PORT") == "0":
        raise ValueError("MASTER_PORT is 0, at which nobody can be met: give the launcher a port, --master_port 29500")
    if world == 1 and _true(environ, "ACCELERATE_USE_CPU") and "RANK" not in environ:
        return ["one process: accelerate starts several on CPUs with launch/ddp_cpu.yaml or launch/zero3_cpu.yaml only"]
    return [f"{world} processes"] if world > 1 else []


def check_train(train: Mapping[str, Any], launched: Launched, place: str) -> list[str]:
    """What to print about a step's `train:` in this launch; ValueError, a line for each, where something else than it
    says would be trained."""
    given = train.get("deepspeed") or launched.deepspeed
    config = _read(given, place) if isinstance(given, str) else given
    wrong = [f"{place}: {sentence}" for sentence in _wrong(train, launched, config)]
    if wrong:
        raise ValueError("\n".join(wrong))
    said = []
    if launched.precision in PRECISIONS and not any(train.get(one) for one in PRECISIONS):
        said.append(f"{place}: computes in {launched.precision}, as the launcher's mixed_precision says")
    if config is not None and _offloads(config):
        said.append(f"{place}: DeepSpeed's CPU Adam stands in for torch's AdamW, with the same settings")
    return said


def _wrong(train: Mapping[str, Any], launched: Launched, config: Mapping[str, Any] | None) -> Iterator[str]:
    on_cpu = train.get("use_cpu") is True or launched.device == "cpu" or launched.kept_on_cpu
    if on_cpu and (launched.fsdp or train.get("fsdp")):
        yield "on CPUs accelerate replaces FSDP by DDP; launch/ddp_cpu.yaml says so, launch/zero3_cpu.yaml shards"
    if launched.device == "cpu" and (launched.world or 1) > 1 and train.get("use_cpu") is False:
        yield "use_cpu: false, and there is no accelerator: of several processes each would believe it is the only one"
    for one in PRECISIONS:
        if launched.precision == one and train.get(one) is False:
            yield f"{one}: false, but the launcher's mixed_precision: {one} would win; set it to 'no' there"
    if config is None:
        return
    if launched.kept_on_cpu:
        yield "ACCELERATE_USE_CPU=true makes accelerate leave DeepSpeed out and train by DDP; unset it and use_cpu"
    if launched.deepspeed_on_cpu and not on_cpu:
        yield f"DS_ACCELERATOR=cpu, but the trainer computes on {launched.device or 'a GPU'}; add --use_cpu true"
    for block, instead in (("optimizer", "optim, learning_rate and weight_decay"), ("scheduler", "lr_scheduler_type")):
        if block in config:
            yield f"the DeepSpeed configuration has its own {block}, which would replace {instead} here; take it out"
    optim = train.get("optim", ADAMW[0])
    if _offloads(config) and optim not in ADAMW:
        yield (
            f"optim: {optim}, but with offload_optimizer accelerate replaces every optimizer by DeepSpeed's CPU Adam; "
            f"give a DeepSpeed JSON with zero_force_ds_cpu_optimizer: false"
        )
    yield from _batches(train, launched.world, config)


def _batches(train: Mapping[str, Any], world: int | None, config: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of the DeepSpeed configuration that aren't the recipe's."""
    rows, steps = (train.get(name, default) for name, default in (("per_device_train_batch_size", 8), (STEPS, 1)))
    mine = [
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", [rows]),
        (STEPS, STEPS, [steps]),
        ("train_batch_size", f"per_device_train_batch_size x {STEPS} x processes", [rows, steps, world]),
    ]
    for name, ours, factors in mine:
        theirs = str(config.get(name, "auto"))
        if theirs != "auto" and None not in factors and theirs != str(product := math.prod(factors)):
            yield f"the DeepSpeed configuration has {name}: {theirs}, and {ours} is {product}; write auto there"


def _offloads(config: Mapping[str, Any]) -> bool:
    device = (config.get("zero_optimization") or {}).get("offload_optimizer", {}).get("device", "none")
    return str(device) != "none" and config.get("zero_force_ds_cpu_optimizer", True)


def _deepspeed(environ: Mapping[str, str]) -> Mapping[str, Any] | str:
    """What accelerate makes of its own configuration's DeepSpeed block; a file takes its place."""
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
        return environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    device = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    return {
        STEPS: environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        "zero_optimization": {"offload_optimizer": {"device": device}},
    }


def _read(file: str, place: str) -> Mapping[str, Any]:
    if not Path(file).is_file():
        raise ValueError(f"{place}: there is no DeepSpeed configuration {file} (from {Path.cwd()})")
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")
