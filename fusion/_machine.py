"""What this machine adds to a recipe: its device, and train fields without which a CPU refuses to train."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion import words
from fusion._say import nearest
from fusion.plan import Planned


@dataclass(frozen=True)
class Machine:
    """The device of this rank, the train fields that a machine without an accelerator needs (no part of keys), and how
    many accelerators it shows."""

    device: str
    train: Mapping[str, Any]
    devices: int = 0


def here(overrides: Mapping[str, Any], local: int) -> Machine:
    """This rank's machine. `use_cpu: true` among the overrides keeps to the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type == "cpu":
        needed = {"use_cpu": True, "bf16": False}
        return Machine("cpu", {name: value for name, value in needed.items() if name not in overrides})
    if overrides.get("use_cpu"):
        return Machine("cpu", {})
    devices = torch.accelerator.device_count()
    return Machine(f"{found.type}:{local % devices}", {}, devices)


def arguments(planned: Planned, machine: Machine) -> dict[str, Any]:
    """The fields a step's function is called with, on this machine."""
    given = planned.arguments
    if machine.train and "train" in planned.word.names:
        given["train"] = {**(given.get("train") or {}), **machine.train}
    return given


def check_train(planned: Planned, machine: Machine) -> None:
    """ValueError with the nearest guess for a train field that the step's module does not know, and for bfloat16 on a
    CPU that has no instructions for it."""
    fields = arguments(planned, machine)
    if "train_fields" not in planned.word.functions or not fields.get("train"):
        return
    function = words.module(planned.word).train_fields
    asked = inspect.signature(function).parameters  # it gets what it names: `algorithm`, or all `fields`
    known = function(**{name: value for name, value in {**fields, "fields": fields}.items() if name in asked})
    for name in fields["train"]:
        if name not in known:
            raise ValueError(f"{planned.step.place}.train: there is no train field '{name}'{nearest(name, known)}")
    if machine.device == "cpu" and fields["train"].get("bf16") and not _computes_bf16():
        raise ValueError(
            f"{planned.step.place}.train.bf16: this CPU has no instructions for bfloat16, and emulates them; "
            f"leave it out, or false"
        )


def _computes_bf16() -> bool:
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
