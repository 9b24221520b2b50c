"""The directory that a merge writes to before it has its name: begun once, continued, shared by ranks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion import _carry
from fusion._merge_plan import Planned
from fusion._say import size
from fusion.checkpoint import Shard, Writer

PLAN = "merge-plan.json"
LEFT = ("manifest-*.jsonl", "stats-*", "finished-*")  # what is no part of the result
Wait = Callable[[Callable[[], bool], str], None]


def refuse_place(out: Path) -> None:
    """ValueError for a directory that is there already, and for one that can't be made."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists; give another directory, or take it away")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "may not be written to" if above.is_dir() else "is a file"
        raise ValueError(f"{out} can't be made, because {above} {why}; give another directory")


@contextmanager
def alone(partial: Path) -> Iterator[None]:
    """One process at a time writes there; the kernel lets go when it dies."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is writing {partial}; wait for it or stop it") from None
        yield


def prepare(
    plan: Planned, directory: Path, shards: Sequence[Shard], extras: Sequence[Shard], say: Callable[[str], None]
) -> None:
    """Files of their final size, unless an earlier run of the same merge made them."""
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / PLAN
    if begun(directory, plan):
        _open_session(directory, plan)
        return
    if marker.exists():
        say(f"{directory} was begun with other inputs or parameters; it is begun anew")
        marker.unlink()
    beside = [directory / name for name in (*_carry.FILES, *_carry.OWN)]  # of one that was killed at its very end
    for old in [*directory.glob("*.safetensors"), *left_over(directory), *beside]:
        old.unlink(missing_ok=True)
    shutil.rmtree(directory / "extras", ignore_errors=True)
    need, free = sum(one.size for one in (*shards, *extras)), shutil.disk_usage(directory).free
    if need > free:
        raise ValueError(f"the result takes {size(need)}, and {directory.parent} has {size(free)} free; make room")
    Writer.create(directory, shards)
    if extras:
        (directory / "extras").mkdir()
        Writer.create(directory / "extras", extras)
    _open_session(directory, plan)


def _open_session(directory: Path, plan: Planned) -> None:
    temporary = directory / f"{PLAN}.new"
    session = f"{os.getpid()}-{time.time_ns()}"
    temporary.write_text(json.dumps({"session": session, "plan": plan.identity}), encoding="utf-8")
    temporary.rename(directory / PLAN)


def session(directory: Path) -> dict[str, Any]:
    file = directory / PLAN
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def begun(directory: Path, plan: Planned) -> bool:
    return session(directory).get("plan") == plan.identity


def patient(ready: Callable[[], bool], what: str) -> None:
    while not ready():
        time.sleep(0.02)


def meet(directory: Path, rank: int, world: int, wait: Wait) -> None:
    """Rank 0 goes on when the others have written theirs in this session, they when rank 0 has seen that."""
    if world == 1:
        return
    if rank > 0:
        told: set[str] = set()  # rank 0 waits for the first word of a session, so that the directory is there still

        def seen() -> bool:
            current = session(directory).get("session")
            if current is not None and current not in told:
                (directory / f"finished-{current}-{rank}").touch()
                told.add(current)
            return current is None

        wait(seen, "rank 0 to finish the merge")
        return
    current = session(directory)["session"]
    others = [directory / f"finished-{current}-{other}" for other in range(1, world)]
    wait(lambda: all(one.exists() for one in others), "the other ranks' tensors")


def left_over(directory: Path) -> list[Path]:
    """What the ranks told one another."""
    return [file for pattern in LEFT for file in directory.glob(pattern)]
