"""`fusion launch`: one recipe in several processes, through accelerate and a configuration that lies in launch/.

What has to stand in the environment for a configuration to do what it says (and not something else, silently) is in
`environment`; docs/launch.md tells the same for those who call accelerate, torchrun or deepspeed themselves.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from fusion import _launched
from fusion._options import parse
from fusion.plan import Plan, plan
from fusion.recipe import load, locate

CPU_FIELDS = ("--use_cpu", "true", "--bf16", "false")


@dataclass(frozen=True)
class Launch:
    """A launch that was checked: the command and its environment, the plan of its processes, what to know about it."""

    command: list[str]
    environ: dict[str, str]
    plan: Plan
    said: list[str]


def launch(recipe: str, config: str, processes: int | None, out: str | None, extra: Sequence[str]) -> int:
    """The exit status of `accelerate launch -m fusion.run RECIPE` with a configuration; arguments as of `prepare`."""
    prepared = prepare(recipe, config, processes, out, extra)
    return _wait(prepared.command, prepared.environ)


def prepare(recipe: str, config: str, processes: int | None, out: str | None, extra: Sequence[str]) -> Launch:
    """What `launch` starts.

    config: a configuration's name in launch/, or its file.
    processes: how many in all; None takes the visible devices, or on CPUs what the configuration says.
    extra: more options of `fusion run` and `--key value` pairs for every `train:` block, handed on as they are.
    Raises ValueError for an unknown configuration, more processes than devices, and for what `plan` or the processes
    would refuse.
    """
    file = locate("launch", config)
    settings = read(file)
    cpu = on_cpu(file, settings)
    count = processes_of(file, settings, cpu, processes)
    arguments = [recipe, *(["--out", out] if out is not None else []), *(CPU_FIELDS if cpu else ()), *extra]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(count), "-m", "fusion.run", *arguments]
    environ = environment(settings, cpu, count, os.environ)
    options = parse(arguments)
    planned = plan(load(options.recipe, options.overrides), options.out)
    launched = _launched.of_environment({**environ, **_launched.told(settings)}, count, "cpu" if cpu else "")
    said = [f"{count} process{'es' * (count > 1)} by {config}"]
    for one in planned.steps:
        if "train" in one.word.names:
            said += _launched.check_train(one.fields.get("train") or {}, launched, f"{one.step.place}.train")
    return Launch(command, environ, planned, said)


def read(file: Path) -> dict[str, Any]:
    """The fields of an accelerate configuration."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"--config: {file} is no accelerate configuration: it has no distributed_type")
    kind = str(settings["distributed_type"])
    if kind == "MULTI_CPU":
        raise ValueError(f"--config: {file}: accelerate starts one process only for MULTI_CPU; see launch/ddp_cpu.yaml")
    if settings.get("num_machines", 1) != 1:
        raise ValueError(
            f"--config: {file} is for {settings['num_machines']} machines; `fusion launch` starts one, "
            "docs/launch.md says what to run on each"
        )
    return settings


def on_cpu(file: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the processes compute on CPUs: the file's name ends in _cpu, or it says use_cpu."""
    cpu = file.stem.endswith("_cpu") or settings.get("use_cpu") is True
    if cpu and settings["distributed_type"] == "FSDP":
        raise ValueError(
            f"--config: {file}: on CPUs accelerate replaces FSDP by DDP; ddp_cpu says so, zero3_cpu shards"
        )
    if cpu and settings["distributed_type"] == "DEEPSPEED" and settings.get("use_cpu") is True:
        raise ValueError(f"--config: {file}: use_cpu turns DeepSpeed off; leave it out and end the file's name in _cpu")
    return cpu


def processes_of(file: Path, settings: Mapping[str, Any], cpu: bool, asked: int | None) -> int:
    """How many processes to start; ValueError when there are fewer devices."""
    if asked is not None and asked < 1:
        raise ValueError(f"-n {asked}: at least one process is needed")
    if asked is not None and asked > 1 and settings["distributed_type"] == "NO":
        raise ValueError(f"-n {asked}: accelerate starts one process only for {file.stem}; several: ddp, zero3, ...")
    if cpu:
        return asked or int(settings.get("num_processes", 2))
    devices = _devices()
    if not devices:
        twin = f"{file.stem}_cpu" if file.with_stem(f"{file.stem}_cpu").is_file() else "ddp_cpu"
        raise ValueError(f"--config {file.stem} computes on accelerators and this machine shows none; on CPUs: {twin}")
    count = asked or (1 if settings["distributed_type"] == "NO" else devices)
    if count > devices:
        raise ValueError(
            f"-n {count}: only {devices} accelerator{'s' * (devices > 1)} visible, and each process needs one"
        )
    return count


def environment(settings: Mapping[str, Any], cpu: bool, count: int, outer: Mapping[str, str]) -> dict[str, str]:
    """The environment of the launcher and so of every process it starts."""
    inner = dict(outer)
    # DeepSpeed compiles one operator on first use and looks ninja up on the PATH, where an environment that is used
    # without being activated does not stand.
    inner["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), outer.get("PATH", "")])
    inner.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not cpu:
        return inner
    inner.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # gloo picks an interface by the host's name, which need not resolve; one machine needs no more than the loopback.
    inner.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    inner["CUDA_VISIBLE_DEVICES"] = ""
    if settings["distributed_type"] == "DEEPSPEED":
        inner["DS_ACCELERATOR"] = "cpu"
        inner.pop("ACCELERATE_USE_CPU", None)  # it would turn DeepSpeed off
    else:
        inner["ACCELERATE_USE_CPU"] = "true"  # without it each process believes it is the only one
    return inner


def _devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _wait(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs to the end; Ctrl-C reaches the processes by itself, a termination is handed on, and both are waited for."""
    process = subprocess.Popen(list(command), env=dict(environ))
    terminated = False

    def hand_on(*_: Any) -> None:
        nonlocal terminated
        terminated = True
        # Not to the launcher, which would leave or kill processes that are saving; it ends when they have ended.
        for child in psutil.Process(process.pid).children() or [process]:
            child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        while True:
            try:
                status = process.wait()
                return 143 if terminated and status else 128 - status if status < 0 else status
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
