"""SIGTERM while a trainer runs (Slurm sends it before the time is up): the step ends, a checkpoint is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback


class SaveAndStop(TrainerCallback):
    """Saves and stops at the end of the optimizer step in which SIGTERM reached any rank; `stopped` says it did."""

    def __init__(self) -> None:
        self.asked, self.stopped = False, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = self.asked
        if args.world_size > 1:  # one rank alone would save a part and leave the others in their next collective
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def listening(callback: SaveAndStop) -> Iterator[None]:
    """While it lasts, SIGTERM only sets `asked`; one that came too late for any step takes effect afterwards."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return

    def ask(*_: Any) -> None:
        callback.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        # also out of a collective that broke because another rank was killed, after which launchers send it
        if callback.asked and not callback.stopped:
            signal.raise_signal(signal.SIGTERM)
