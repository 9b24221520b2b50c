"""Groups of ranks inside one job that train apart and meet every so many steps, as agents do (DIMAT, Saadati et al.
2024, arXiv:2404.08079); here each group is one rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from fusion.checkpoint import Source
from fusion.online.callback import opened, unwrapped
from fusion.online.live import merge_into
from fusion.online.meet import MergeWith
from fusion.online.periodic import refuse_unlike


class MergeGroupsCallback(TrainerCallback):
    """Trains one network a rank, on that rank's data, and merges all of them every so many steps and in the last one.

    `trainer` has to be set before it trains: DDP's averaging of gradients is turned off in its wrapper. The others are
    the parameters of MergeWith. Moments stay each rank's own, and lie in a checkpoint besides what the trainer saves.
    """

    def __init__(
        self,
        groups: int,
        every: int,
        method: str = "linear",
        base: str | Path | Source | None = None,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.merge = MergeWith(every, method, None, base is not None, seed, params or {}, groups)
        self.base = None if base is None else opened(base, "base")
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Turns the averaging off, and goes on with each rank's own network where a checkpoint left off."""
        self.merge.check_steps(state.max_steps)
        if self.trainer is None:
            raise ValueError("set the callback's trainer before training: gradients would be averaged over all ranks")
        if args.world_size != self.merge.groups:
            raise ValueError(
                f"groups is {self.merge.groups}, and {args.world_size} processes were launched; a group is one "
                f"process here, launch as many as there are groups"
            )
        wrapper = self.trainer.model_wrapped
        if not isinstance(wrapper, DistributedDataParallel):
            raise ValueError(
                f"groups train apart under plain DDP (torchrun, or fusion launch --config ddp), and this model is in "
                f"{type(wrapper).__name__}, whose ranks hold parts of one network"
            )
        if args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices divides each group's loss by all groups' tokens; say false")
        refuse_unlike(unwrapped(given["model"]), given["optimizer"], [] if self.base is None else [(self.base, "base")])
        wrapper.register_comm_hook(None, _own)
        if state.global_step > 0 and args.process_index > 0:  # the trainer has read the first rank's, on all
            self._load(_file(args, state), given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self.merge.every and state.global_step < state.max_steps:
            return
        merge_into(
            given["optimizer"],
            unwrapped(given["model"]).named_parameters(),
            self.merge.method,
            [],
            base=self.base,
            seed=self.merge.seed,
            step=state.global_step,
            params=self.merge.params,
            apart=True,
        )

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The trainer saves the first rank's network and moments; each of the others leaves its own."""
        if args.process_index > 0:
            file = _file(args, state)
            file.parent.mkdir(parents=True, exist_ok=True)
            weights = {name: weight.detach() for name, weight in unwrapped(given["model"]).named_parameters()}
            torch.save({"weights": weights, "optimizer": given["optimizer"].state_dict()}, file)

    def _load(self, file: Path, given: Mapping[str, Any]) -> None:
        if not file.is_file():
            raise ValueError(f"{file} is not there: the checkpoint was saved without groups, or with fewer of them")
        found = torch.load(file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, weight in unwrapped(given["model"]).named_parameters():
                weight.copy_(found["weights"][name])
        given["optimizer"].load_state_dict(found["optimizer"])


def _own(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for a bucket of gradients: they stay what this rank found."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"group-{args.process_index}.pt"
