"""Ranks of one job as processes of this machine, over gloo; and single ones, to be killed."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environments(world: int) -> list[dict[str, str]]:
    """One for each rank of a job that has met nobody yet."""
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # ninja, for DeepSpeed's operators
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def together(world: int, module: str, *arguments: str) -> None:
    """Runs `python -m MODULE ARGUMENTS` as so many ranks; fails, with what they said, unless all end well."""
    command = [sys.executable, "-m", module, *arguments]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env=one, **pipes) for one in environments(world)]
    said = [one.communicate(timeout=300)[0] for one in ranks]
    assert all(one.returncode == 0 for one in ranks), "\n".join(text[-3000:] for text in said)


def leave() -> None:
    """Ends a rank when all ranks are through. Without Python's own ending, in which threads of torch's sometimes abort
    a process that has written all ("terminate called without an active exception")."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def forked(work: Callable[[], object]) -> int:
    """A process of its own that does the work; its id. A fork, since every method in a fresh one would take minutes."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
