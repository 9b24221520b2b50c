"""The one trainer of our own: transformers.Trainer with the loss of distillation and the count of target tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from fusion._causal import split_head
from fusion.losses._head import chunked_loss
from fusion.losses._rows import Fold, Rows
from fusion.windows import IGNORED


@dataclass(frozen=True)
class Objective:
    """What a distill step minimises at each position; see fusion.losses._head.chunked_loss."""

    divergence: Callable[..., torch.Tensor]
    kind: str  # of the targets: sampled, truncated or whole
    fold: Fold
    lm_weight: float
    lm_everywhere: bool
    temperature: float
    chunk: int
    eager: bool = False  # take the head's gradients in forward, which saves its second run where no weight is sharded


def learn_in_forward(model: PreTrainedModel, objective: Objective) -> None:
    """Lets `model(lesson=batch, counts=...)` return the loss.

    Decoder and head so run inside the forward of whatever wraps the model: DDP then synchronises gradients and ZeRO-3
    gathers weights as for any other forward.
    """
    plain = model.forward

    def forward(self: PreTrainedModel, *args: Any, lesson: Any = None, counts: Any = None, **inputs: Any) -> Any:
        if lesson is None:
            return plain(*args, **inputs)
        decoder, head = split_head(self)
        names = [name for name in ("input_ids", "position_ids", "attention_mask") if name in lesson]
        hidden = decoder(**{name: lesson[name] for name in names}, use_cache=False).last_hidden_state
        labels = torch.nn.functional.pad(
            lesson["labels"][:, 1:], (0, 1), value=IGNORED
        )  # position p predicts token p + 1
        rows = Rows(
            ids=lesson["target_ids"],
            log_probs=lesson["target_bits"].view(torch.float32),
            tail=lesson["tail_bits"].view(torch.float32),
            kind=objective.kind,
            present=torch.ones_like(lesson["target_at"], dtype=torch.bool),
        )
        loss, sums = chunked_loss(
            hidden.flatten(0, 1),
            head,
            labels.flatten(),
            rows,
            objective.fold,
            objective.divergence,
            objective.lm_weight,
            objective.lm_everywhere,
            counts[:2],
            temperature=objective.temperature,
            chunk=objective.chunk,
            rows_at=lesson["target_at"],
            calls=1 if objective.eager else -(-int(counts[2]) // objective.chunk),
            parameters=tuple(self.get_output_embeddings().parameters()) if objective.eager else None,
        )
        return loss, torch.stack([sums[name].double() for name in ("ce_sum", "kd_sum", "labels", "targets")])

    model.forward = MethodType(forward, model)


class DistillTrainer(Trainer):
    """transformers.Trainer for batches with targets; its loss is normalised by global counts of labels and targets."""

    sums: torch.Tensor | None = None  # (4,) since the last log: language-model nats, target nats, labels, targets

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Micro-batches of one optimizer step and counts (3,) over all ranks: labels and targets in them, and the most
        labels of any micro-batch, since a sharded head must be called as often on every rank."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        labels = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        targets = sum(batch["target_at"].numel() for batch in batches)
        own = torch.tensor([sum(labels), targets, max(labels, default=0)], device=device)
        everyone = self.accelerator.gather(own).view(-1, 3)
        return batches, torch.cat([everyone[:, :2].sum(0), everyone[:, 2:].amax(0)])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, times the number of ranks because their gradients are averaged."""
        self.loss_is_scaled_for_ga = True  # by the counts of the whole step
        loss, sums = model(lesson=inputs, counts=num_items_in_batch)
        self.sums = sums if self.sums is None else self.sums + sums
        return loss * self.accelerator.num_processes
