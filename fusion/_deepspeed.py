"""What DeepSpeed leaves behind: locks of compilations that were killed, and the names of its shared memory."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

STALE = 600.0  # seconds; its operators compile in 90


def check_operators(root: Path, now: float | None = None) -> str | None:
    """What to print while an operator is being compiled elsewhere; ValueError when nobody does so any more.

    root: where torch builds extensions, a folder each. It waits for their lock for ever, without a word, and a
    compilation that was killed never takes it away.
    """
    for lock in sorted(root.glob("**/lock")):
        if _held(lock):
            continue
        try:
            age = (time.time() if now is None else now) - lock.stat().st_mtime
        except FileNotFoundError:
            continue  # released meanwhile
        if age > STALE:
            raise ValueError(
                f"DeepSpeed's operator '{lock.parent.name}' has been compiling for {age / 60:.0f} minutes, and no "
                f"process of this machine does so: delete {lock}, and the same command continues"
            )
        return f"waiting while DeepSpeed's operator is compiled elsewhere; if it was killed there, delete {lock}"
    return None


def operators() -> Path:
    """Where torch builds extensions on this machine."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def forget_shared_memory(environ: Mapping[str, str] | None = None) -> None:
    """Takes the names off the memory that the ranks of one CPU machine share, once all have mapped it.

    DeepSpeed itself never does: 66 MiB of memory for each rank would outlive every run, and a later run that is given
    the same port would read another's flags. To be called by all ranks, after DeepSpeed has met them.
    """
    import torch.distributed as dist

    environ = os.environ if environ is None else environ
    if not (dist.is_initialized() and environ.get("LOCAL_SIZE") == str(dist.get_world_size())):
        return  # then it uses gloo
    dist.barrier()
    meeting = f"{environ.get('MASTER_ADDR', '')}_{environ.get('MASTER_PORT', '')}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{meeting}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def _held(file: Path) -> bool:
    """Whether a process of ours on this machine has it open."""
    for one in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(one) == str(file):
                return True
        except OSError:
            continue
    return False
