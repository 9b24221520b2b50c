"""A network in training that meets another one every so many steps, as agents do that train apart (DIMAT, Saadati
et al. 2024, arXiv:2404.08079)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from fusion.checkpoint import Source
from fusion.online._agree import agreed
from fusion.online.callback import innermost, opened, unwrapped
from fusion.online.layouts import layout
from fusion.online.live import merge_into
from fusion.online.meet import MergeWith
from fusion.online.vectors import checked_region, refuse_ties


class MergeWithCallback(TrainerCallback):
    """Merges the network in training with a model on disk every so many steps, under DDP, FSDP2 and DeepSpeed ZeRO.

    model, base: a directory, a hub id or an open Source. The other parameters are those of MergeWith. The optimizer's
    moments stay as they are. Nothing has to be saved besides: in a step in which both happen, merging comes before
    saving.
    """

    def __init__(
        self,
        model: str | Path | Source,
        every: int,
        method: str = "linear",
        weight: float | None = None,
        base: str | Path | Source | None = None,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.merge = MergeWith(every, method, weight, base is not None, seed, params or {})
        self.other = opened(model, "model")
        self.base = None if base is None else opened(base, "base")

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuses, on all ranks, what could not be merged later."""
        self.merge.check_steps(state.max_steps)
        read_from = [(self.other, "model"), *([] if self.base is None else [(self.base, "base")])]
        refuse_unlike(unwrapped(given["model"]), given["optimizer"], read_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self.merge.every:
            return
        merge_into(
            given["optimizer"],
            unwrapped(given["model"]).named_parameters(),
            self.merge.method,
            [self.other],
            base=self.base,
            weights=self.merge.weights,
            seed=self.merge.seed,
            step=state.global_step,
            params=self.merge.params,
        )


def refuse_unlike(network: Any, optimizer: Any, read_from: Sequence[tuple[Source, str]]) -> None:
    """ValueError, on all ranks, for an adapter and for a model to read that has not the network's tensors."""
    named = list(network.named_parameters())
    if any(".lora_" in name for name, _ in named):
        raise ValueError("merge_with merges whole weights, and this model trains an adapter; leave one of the two out")
    tied = network.all_tied_weights_keys if isinstance(network, PreTrainedModel) else {}
    for source, what in read_from:
        refuse_ties(source, what, [name for name, _ in named], tied)
    pieces = layout(innermost(optimizer), named).pieces
    agreed(lambda: [checked_region(one, f"the {what}", p, p.start) for p in pieces for one, what in read_from])
