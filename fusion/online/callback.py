"""Online merging as a callback of the transformers and TRL: DPOTrainer(..., callbacks=[OnlineMergeCallback()])."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from fusion.online.attach import Handle
from fusion.online.settings import OnlineMerge
from fusion.online.vectors import TaskVectors, open_model

STATE = "online_merge"  # its files in a checkpoint of the trainer


class OnlineMergeCallback(TrainerCallback):
    """Merges the task vector (reference - base) into every optimizer step, under DDP, FSDP2 and DeepSpeed ZeRO.

    base, reference: a directory or a hub id; `reference` left out is the model being tuned, as it was loaded. Only the
    slices that this rank's optimizer holds are read. The other parameters are those of OnlineMerge.
    """

    def __init__(
        self,
        base: str | Path | None = None,
        reference: str | Path | None = None,
        method: str = "ties",
        alpha: float = 1e-6,
        density: float | None = None,
        every: int = 1,
        semantics: Literal["paper", "code"] = "paper",
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        if base is None:
            raise ValueError(
                "online merging needs a base: the model before supervised fine-tuning, whose difference to the "
                "reference is what gets merged in"
            )
        self.base, self.reference = base, reference
        self.merge = OnlineMerge(method, alpha, density, every, semantics, seed, params or {})
        self.handle: Handle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attaches to the innermost torch optimizer, which exists by now, and goes on where a checkpoint left off."""
        model = unwrapped(given["model"])
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if any(".lora_" in name for name in trained) and self.merge.every == 1:
            raise ValueError(
                "a LoRA adapter's factors have no task vector to merge at every step: the reference's change lies in "
                "the weights the adapter sits on; merge every few steps into whole weights, or tune all of them"
            )
        reference = self.reference
        if reference is None and state.global_step > 0:
            reference = model.config.name_or_path  # the weights have moved on since
            if not Path(reference).is_dir():
                raise ValueError(
                    "a resumed run needs the reference's path: the model was trained on, so it is no reference any "
                    "more; give reference"
                )
        vectors = TaskVectors(
            open_model(self.base, "base"), None if reference is None else open_model(reference, "reference")
        )
        self.handle = self.merge.attach(innermost(given["optimizer"]), model.named_parameters(), vectors)
        density = self.merge.checked()[1].get("density", 1.0)
        if (
            self.merge.semantics == "paper"
            and self.merge.method == "dare"
            and density != 1.0
            and state.is_world_process_zero
        ):
            print(
                f"online merging keeps a share of {density} of each update without rescaling it, as the paper does: on "
                f"average this trains at {density} times the learning rate (semantics: code divides by it)"
            )
        if state.global_step > 0:
            self.handle.load_state_dict(load(Path(args.output_dir) / f"checkpoint-{state.global_step}", args))

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.handle is not None
        if innermost(given["optimizer"]) is not self.handle.optimizer:
            raise ValueError(
                "the optimizer was replaced after online merging was attached to it: list the callback last, or find "
                "the plugin that replaces it"
            )
        self.handle.watch = (state.global_step + 1) % max(int(args.logging_steps), 1) == 0 or state.global_step == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.handle is not None and logs is not None and "loss" in logs:
            logs.update({f"online_{name}": value for name, value in self.handle.readings.items()})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Each rank leaves what a window has gathered so far; task vectors are read again."""
        assert self.handle is not None
        save(Path(args.output_dir) / f"checkpoint-{state.global_step}", args, self.handle.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is not None:
            self.handle.detach()


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"online merging found no torch optimizer inside {type(optimizer).__name__}; if the DeepSpeed "
            f'configuration has an "optimizer" block, leave that out'
        )
    return optimizer


def unwrapped(model: Any) -> Any:
    """The model inside DDP's and DeepSpeed's wrappers, whose parameters have the checkpoint's names."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _file(folder: Path, args: Any) -> Path:
    return folder / f"{STATE}-{args.process_index}-of-{args.world_size}.safetensors"


def save(folder: Path, args: Any, state: Mapping[str, Any]) -> None:
    """Steps seen and the weights at the start of a window, of one rank."""
    tensors = {f"{key}/{i}": t.cpu() for key, pieces in state["snapshots"].items() for i, t in enumerate(pieces)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _file(folder, args), metadata={"steps": json.dumps(state["steps"])})


def load(folder: Path, args: Any) -> dict[str, Any]:
    """What `save` left."""
    file = _file(folder, args)
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {file.name}: it was saved without online merging, or by another number of processes"
        )
    with safe_open(file, "pt") as stored:
        snapshots: dict[str, list[torch.Tensor]] = {}
        for name in sorted(stored.keys(), key=lambda n: (n.rpartition("/")[0], int(n.rpartition("/")[2]))):
            snapshots.setdefault(name.rpartition("/")[0], []).append(stored.get_tensor(name))
        return {"steps": json.loads(stored.metadata()["steps"]), "snapshots": snapshots}
