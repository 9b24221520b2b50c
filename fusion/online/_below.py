"""Merging below a LoRA adapter (Hu et al. 2021, arXiv:2106.09685): what a window of steps did to the factors' product
is merged as an update of the weight under them.

A fresh adapter begins at the reference, whose change lies in the weights below it. With D what a window changed in
s B A and T the task vector there, the adapted weight becomes what it was at the window's start + merge([D, T]). The
factors keep what they have learnt, the optimizer its moments, and the frozen weight takes merge([D, T]) - D.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fusion.online.settings import OnlineMerge
from fusion.online.vectors import TaskVectors

FILE = "online_merge-below.safetensors"


@dataclass(frozen=True)
class Adapted:
    """A weight and the trained factors above it."""

    layer: Any  # of peft
    adapter: str

    @property
    def weight(self) -> Tensor:
        return self.layer.get_base_layer().weight.data

    @property
    def factors(self) -> list[Tensor]:
        return [parameter for name, parameter in self.layer.named_parameters() if _is_factor(name, self.adapter)]

    def product(self, factors: list[Tensor] | None = None) -> Tensor:
        """s B A in the weight's shape, of the factors as they are or of others in their place."""
        own = [parameter.data for parameter in self.factors]
        for parameter, other in zip(self.factors, factors or own, strict=True):
            parameter.data = other
        found = self.layer.get_delta_weight(self.adapter)
        for parameter, data in zip(self.factors, own, strict=True):
            parameter.data = data
        return found


class Below:
    """The windows of an adapter's steps, and their merging into the weights below it."""

    def __init__(self, merge: OnlineMerge, model: torch.nn.Module, vectors: TaskVectors) -> None:
        self.every = merge.every
        self.layers = _adapted(model)
        if vectors.reference is None and any(bool(one.product().count_nonzero()) for one in self.layers.values()):
            raise ValueError(
                "the adapter has been trained already, so the weights below it are no reference; give reference, the "
                "whole model: the adapter merged into its base"
            )
        # Nothing steps on the weights below: an optimizer and parameters in name only, which share their memory.
        named = {name: torch.nn.Parameter(one.weight) for name, one in self.layers.items()}
        holder = torch.optim.SGD(named.values(), lr=0.0)
        self.handle = replace(merge, every=1).attach(holder, named.items(), vectors)
        self.start: dict[str, list[Tensor]] = {}  # by weight the factors at the start of the window

    def begin(self, step: int) -> None:
        """Before the step that follows `step` others: remembers the factors where a window starts."""
        if step % self.every == 0 and not self.handle.idle:
            self.start = {n: [f.detach().clone() for f in one.factors] for n, one in self.layers.items()}

    @torch.no_grad()
    def end(self, step: int) -> None:
        """After `step` steps: merges where a window ends, weight by weight."""
        if step % self.every or self.handle.idle:
            return
        for name, one in self.layers.items():
            change = one.product() - one.product(self.start[name])
            one.weight.add_(self.handle.merged(name, change) - change)
        self.start = {}

    def save(self, folder: Path) -> None:
        """The weights below, which a trainer's checkpoint of an adapter leaves out, and a window's start."""
        tensors = {f"weight/{name}": one.weight.cpu() for name, one in self.layers.items()}
        tensors |= {f"{i}/{name}": f.cpu() for name, factors in self.start.items() for i, f in enumerate(factors)}
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"steps": json.dumps(self.handle.steps), "every": str(self.every)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, metadata=meta)

    def load(self, folder: Path, step: int) -> None:
        """Puts back what `save` left, on any number of ranks."""
        file = folder / FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {FILE}: it was saved without online merging below an adapter")
        with safe_open(file, "pt") as stored:
            meta, known = stored.metadata(), set(stored.keys())
            if known != self._names(step) or int(meta["every"]) != self.every:
                raise ValueError(
                    f"{file} was saved with other adapted weights, or with windows of {meta['every']} steps and not "
                    f"{self.every}; go on with the settings it was saved by"
                )
            for name, one in self.layers.items():
                one.weight.copy_(stored.get_tensor(f"weight/{name}"))
                if step % self.every:
                    parts = [stored.get_tensor(f"{i}/{name}").to(f.device) for i, f in enumerate(one.factors)]
                    self.start[name] = parts
        self.handle.load_state_dict({"steps": json.loads(meta["steps"]), "snapshots": {}})

    def _names(self, step: int) -> set[str]:
        inside = step % self.every and not self.handle.idle
        weights = {f"weight/{name}" for name in self.layers}
        return weights | {f"{i}/{n}" for n, one in self.layers.items() if inside for i in range(len(one.factors))}


def refuse_moving_reference(settings: Mapping[str, Any]) -> None:
    """ValueError where a trainer asks the weights below the adapter for the reference's words: they move here.

    settings: the trainer's arguments by name.
    """
    if settings.get("precompute_ref_log_probs") is False:
        raise ValueError(
            "without its adapter the network is the trainer's reference, and online merging changes what lies below "
            "the adapter; set precompute_ref_log_probs: true"
        )
    if "num_generations" in settings and settings.get("beta"):
        raise ValueError(
            f"beta is {settings['beta']}: its KL term asks the network without its adapter, and online merging changes "
            f"what lies below the adapter; set beta: 0.0, or train without peft"
        )


def _is_factor(name: str, adapter: str) -> bool:
    return name.startswith("lora_") and adapter in name.split(".") and not name.endswith(".bias")


def _adapted(model: torch.nn.Module) -> dict[str, Adapted]:
    """By name in the whole model's checkpoint; ValueError names what is trained and is no plain factor."""
    found, factors = {}, set()
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not any(p.requires_grad for p in layer.parameters()):
            continue
        path = path.removeprefix("base_model.model.")
        if type(layer) not in (Linear, Embedding) or layer.lora_variant or len(layer.active_adapters) != 1:
            raise ValueError(
                f"{path} is adapted by {', '.join(layer.active_adapters)} as {type(layer).__name__}"
                f"{' of a variant' if layer.lora_variant else ''}; merging below an adapter knows one plain LoRA "
                f"adapter of linear layers and embeddings (no DoRA, no quantised weights)"
            )
        weight = layer.get_base_layer().weight
        if isinstance(weight, DTensor) or "ds_id" in vars(weight):
            raise ValueError(f"{path}.weight is sharded; below an adapter merges one process, DDP, ZeRO-1 and 2")
        if not weight.is_floating_point():
            raise ValueError(f"{path}.weight holds {weight.dtype}: quantised weights can't merge")
        if len(owners[id(weight)]) > 1:
            raise ValueError(f"{path}.weight is tied to another tensor, which would change with it; adapt other layers")
        found[f"{path}.weight"] = Adapted(layer, layer.active_adapters[0])
        factors |= {id(parameter) for parameter in found[f"{path}.weight"].factors}
    more = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    if more:
        raise ValueError(
            f"{more[0]} is trained beside the factors of an adapter ({len(more)} such); online merging below an "
            f"adapter would leave it out: train factors alone (no bias, no modules_to_save)"
        )
    return found
