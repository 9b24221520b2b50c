"""A step for tests that lives in collectives, and `python -m tests.collective`: fusion.run with quicker heartbeats."""

import os
import signal
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "targets"


def collective(job: "Job", *, out: str, how: Literal["kill", "fault"], on_rank: int) -> None:
    """Adds a number up over the ranks for as long as all of them do; `on_rank` is killed, or fails, in the middle."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for number in range(1000):
        if number == 5 and job.rank == on_rank:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            torch.ones(2) @ torch.ones(3)
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    from fusion import _ranks, run

    _ranks.BEAT, _ranks.GONE = 0.2, 2.0
    sys.exit(run.main())
