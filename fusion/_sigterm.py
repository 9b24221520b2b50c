"""SIGTERM while a trainer runs (Slurm sends it before the time is up): the step ends, a checkpoint is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from fusion._ranks import Terminated


class SaveAndStop(TrainerCallback):
    """Saves and stops at the end of the optimizer step in which SIGTERM reached any rank; `stopped` says it did.

    Not in the last step: what training leaves is saved next anyway.
    """

    def __init__(self) -> None:
        self.asked, self.stopped = False, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:  # one rank alone would save a part and leave the others in their next collective
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.asked = self.asked or bool(flag)
        if self.asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def listening(callback: SaveAndStop, name: str) -> Iterator[None]:
    """While it lasts, SIGTERM only sets `asked`; one that came too late for any step takes effect afterwards.

    name: what ends then, for the sentence of the Terminated that is raised.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return

    def ask(*_: Any) -> None:
        callback.asked = True

    before, whole = signal.signal(signal.SIGTERM, ask), False
    try:
        yield
        whole = True
    finally:
        signal.signal(signal.SIGTERM, before)
        # out of a collective that broke because another rank was killed, after which launchers send it
        if callback.asked and not callback.stopped and not whole:
            signal.raise_signal(signal.SIGTERM)
    if callback.asked and not callback.stopped:
        raise Terminated(f"{name}: SIGTERM, it is done; the same command continues")
