"""Online merging as a callback of the transformers and TRL: DPOTrainer(..., callbacks=[OnlineMergeCallback()])."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback

from fusion._params import depths, layer_of
from fusion.checkpoint import Source
from fusion.online import _saved
from fusion.online._factors import factors, is_factors
from fusion.online._reduce import added_up
from fusion.online.attach import Handle
from fusion.online.final import Final
from fusion.online.settings import Extras, OnlineMerge, refuse_below_adapter
from fusion.online.vectors import TaskVectors, open_model, refuse_ties, region

if TYPE_CHECKING:
    from fusion.online._below import Below

CHUNK = 1 << 22  # elements of the reference that are read at once


class OnlineMergeCallback(TrainerCallback):
    """Merges the task vector (reference - base) into every optimizer step, under DDP, FSDP2 and DeepSpeed ZeRO.

    base, reference: a directory, a hub id or an open Source; `reference` left out is the model being tuned, as it was
    loaded. Only the slices that this rank's optimizer holds are read. The other parameters are those of OnlineMerge and
    of Extras.
    """

    def __init__(
        self,
        base: str | Path | Source | None = None,
        reference: str | Path | Source | None = None,
        method: str = "ties",
        alpha: float = 1e-6,
        density: float | None = None,
        every: int = 1,
        semantics: Literal["paper", "code"] = "paper",
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
        lines: Mapping[str, Any] | None = None,
        ema: float | None = None,
        towards_init: float | None = None,
        pinned: bool = False,
    ) -> None:
        if base is None:
            raise ValueError(
                "online merging needs a base: the model before supervised fine-tuning, whose difference to the "
                "reference is what gets merged in"
            )
        if reference is not None and place_of(reference) == place_of(base):
            raise ValueError(f"reference and base are both {place_of(base)}, so there is nothing to merge")
        self.base, self.reference = base, reference
        self.merge = OnlineMerge(method, alpha, density, every, semantics, seed, params or {}, pinned)
        self.extras = Extras(lines, ema, towards_init)
        self.handle: Handle | None = None
        self.optimizer: torch.optim.Optimizer | None = None  # that it was attached to
        self.below: Below | None = None  # for the weights below an adapter
        self.final: Final | None = None
        self.anchor: Source | None = None  # what drift is measured from
        self.drift: float | None = None
        self.measuring = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attaches to the innermost torch optimizer, which exists by now, and goes on where a checkpoint left off."""
        model = unwrapped(given["model"])
        self.optimizer = innermost(given["optimizer"])
        names = [name for name, _ in model.named_parameters()]
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        adapter = any(".lora_" in name for name in trained)
        if adapter and is_factors(self.base):
            self._tune_factors(state, model, trained)
            self._go_on(args, state)
            return
        base = opened(self.base, "base")
        reference = None if self.reference is None else opened(self.reference, "reference")
        start = str(model.config.name_or_path)  # where the model was loaded from
        local = bool(start) and any(Path(start).glob("*.safetensors"))
        if reference is None and state.global_step > 0:
            if not local:
                raise ValueError(
                    "a resumed run needs the reference's path: the model was trained on, so it is no reference any "
                    "more; give reference"
                )
            reference = opened(start, "reference")
        if adapter:
            self._tune_below(args, state, model, base, reference)
            return
        tied = model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else {}
        for source, what in ((base, "base"), (reference, "reference")):
            if source is not None:
                refuse_ties(source, what, names, tied)
        vectors = TaskVectors(base, reference, scale=self._scales(names))
        self.handle = self.merge.attach(self.optimizer, model.named_parameters(), vectors)
        self.anchor = opened(start, "reference") if reference is None and local else reference
        if self.extras.ema is not None or self.extras.towards_init:
            back = opened(start, "the model being tuned") if self.extras.towards_init else None
            self.final = Final(self.handle.layout, self.optimizer, self.extras, back)
        self._go_on(args, state)

    def _tune_factors(self, state: Any, model: Any, trained: list[str]) -> None:
        """Attaches to the factors of an adapter."""
        assert self.base is not None and self.optimizer is not None
        if self.extras.towards_init:
            raise ValueError("towards_init goes back to a whole model's weights; leave it out for a LoRA adapter")
        if self.reference is None and state.global_step > 0:
            raise ValueError("a resumed run needs the reference: the directory of the adapter that tuning began with")
        scales = self._scales([name for name, _ in model.named_parameters()])
        vectors = factors(trained, self.base, self.reference, state.global_step > 0, scales)
        self.handle = self.merge.attach(self.optimizer, model.named_parameters(), vectors)
        if self.extras.ema is not None:
            self.final = Final(self.handle.layout, self.optimizer, self.extras, None)

    def _tune_below(self, args: Any, state: Any, model: Any, base: Source, reference: Source | None) -> None:
        """Merges into the weights below an adapter, which no optimizer steps on."""
        from fusion.online._below import Below, refuse_moving_reference  # where nothing is adapted, peft isn't needed

        refuse_below_adapter(self.merge, self.extras)
        refuse_moving_reference(vars(args))
        self.below = Below(self.merge, model, TaskVectors(base, reference, scale=self._scales(list(base.entries))))
        self.handle = self.below.handle
        if state.is_world_process_zero and (said := self.rate()):
            print(said)
        if state.global_step > 0:
            self.below.load(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)

    def _go_on(self, args: Any, state: Any) -> None:
        """Says what the density means, and reads what a checkpoint holds."""
        assert self.handle is not None
        if state.is_world_process_zero and (said := self.rate()):
            print(said)
        if state.global_step > 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _saved.load(folder, args.process_index, args.world_size, self.handle, self.final)

    def rate(self) -> str:
        """What a density without rescaling means for the learning rate; "" where it means nothing."""
        density = self.merge.checked()[1].get("density", 1.0)
        if self.merge.semantics != "paper" or self.merge.method != "dare" or density == 1.0:
            return ""
        return (
            f"online merging keeps a share of {density} of each update without rescaling it, as the paper does: on "
            f"average this trains at {density} times the learning rate (semantics: code divides by it)"
        )

    def _scales(self, names: list[str]) -> dict[str, float] | None:
        """By parameter what LiNeS multiplies its task vector with."""
        if self.extras.lines is None:
            return None
        from fusion.post.lines import lines

        stacks, found = depths(names), {}
        for name in names:
            layer = layer_of(name, stacks)
            found[name] = float(lines(torch.ones(1), torch.zeros(1), name=name, layer=layer, **self.extras.lines))
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.handle is not None
        if innermost(given["optimizer"]) is not self.optimizer:
            raise ValueError(
                "the optimizer was replaced after online merging was attached to it: list the callback last, or find "
                "the plugin that replaces it"
            )
        self.measuring = (state.global_step + 1) % max(int(state.logging_steps), 1) == 0 or state.global_step == 0
        if self.measuring:
            self.handle.watch = True  # until a window ends
        if self.below is not None:
            self.below.begin(state.global_step)
        if self.final is not None:
            self.final.last = state.global_step + 1 >= state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Merges below an adapter; how far the weights are from the reference, when that is logged."""
        if self.below is not None:
            self.below.end(state.global_step)
        if not self.measuring or self.anchor is None or self.handle is None:
            return
        squares = torch.zeros(1, dtype=torch.float64)
        for piece in self.handle.layout.pieces:
            for first in range(0, piece.flat.numel(), CHUNK):
                part = piece.flat[first : first + CHUNK].detach()
                at = piece.start + first
                there = region(self.anchor, piece.name, at, at + part.numel()).to(part.device)
                squares += (part.float() - there).double().square().sum().cpu()
        squares /= self.handle.layout.copies
        self.drift = float(added_up({"squares": squares})["squares"].sqrt())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """What merging did joins what the trainer logs, for the callbacks listed after this one."""
        if self.handle is not None and logs is not None and "loss" in logs:
            logs.update({f"online_{name}": value for name, value in self.handle.readings.items()})
            if self.drift is not None:
                logs["online_drift"] = self.drift

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Each rank leaves what a window has gathered so far; task vectors are read again."""
        assert self.handle is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.below is not None:  # the same on all ranks
            if state.is_world_process_zero:
                self.below.save(folder)
            return
        _saved.save(folder, args.process_index, args.world_size, self.handle, self.final)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is not None:
            self.handle.detach()
        if self.below is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.below.load(Path(state.best_model_checkpoint), state.best_global_step)  # the trainer read the factors
        if self.below is not None and not self.below.handle.idle and state.is_world_process_zero:
            print(
                "the weights below the adapter have changed: the result is the whole model (merge_and_unload), the "
                "adapter alone fits nothing that is on disk"
            )
        if self.final is not None:
            self.final.detach()
            if not self.final.done and state.is_world_process_zero:
                print(
                    f"training ended in step {state.global_step} of {state.max_steps}, before its last: the weights "
                    f"are the policy's own, without ema and towards_init"
                )


def place_of(model: str | Path | Source) -> str:
    """Where a model is, for sentences."""
    return str(model) if isinstance(model, (str, Path)) else str(model.path)


def opened(model: str | Path | Source, what: str) -> Source:
    """The model as a source."""
    return open_model(model, what) if isinstance(model, (str, Path)) else model


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
