"""Work that succeeds on all ranks or on none: nobody enters the next collective while another rank is out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fusion.online._reduce import several

T = TypeVar("T")


def agreed(work: Callable[[], T], besides: str = "") -> T:
    """What the work gives here; when it fails on any rank, all raise the ValueError of the first that failed.

    besides: what else there is to say then.
    """
    if not several():
        return work()
    done: list[T] = []
    failed: Exception | None = None
    try:  # of a rank the edge: what ends here alone would leave the others waiting
        done.append(work())
    except Exception as error:
        failed = error
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failed is None else str(failed) or type(failed).__name__)
    for rank, sentence in enumerate(said):
        if sentence is not None:
            raise ValueError(f"rank {rank}: {sentence}{besides}") from failed
    return done[0]
