"""Several processes, one run: they meet in a directory that all see, and no one waits for somebody who is gone.

Collectives time out and hide who failed; a file does neither. Every rank touches its own heartbeat, whoever fails first
writes the failure file and is the only one to speak, and a daemon thread ends a rank whose peers are gone.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEAT = 2.0  # seconds between two heartbeats
GONE = 40.0  # seconds without one; with GRACE and a slow file system a killed rank ends the job within a minute
MEET = 180.0  # seconds to wait for all ranks at the start
GRACE = 10.0  # seconds a rank has to end by itself after another one failed


class Stopped(Exception):
    """Another rank failed and has said so already."""


class Terminated(Exception):
    """SIGTERM ended a training, on all ranks, after a checkpoint was saved."""


@dataclass
class Ranks:
    """This process among the ranks of a launch; `directory` is None for a process alone."""

    rank: int = 0
    local: int = 0
    world: int = 1
    directory: Path | None = None
    session: str = ""
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> (its beat, when it last changed)
    ended: threading.Event = field(default_factory=threading.Event)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Returns when `ready()`; raises when a rank failed or stopped answering meanwhile."""
        pause = 0.02
        while not ready():
            self.check(what)
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def check(self, what: str = "") -> None:
        """Raises Stopped when a rank failed, ValueError when one stopped answering."""
        if self.directory is None:
            return
        if self._failure().exists():
            raise Stopped
        for rank in self._watched():
            if self._silent(rank):
                doing = f" (waiting for: {what})" if what else ""
                raise ValueError(f"rank {rank} has not answered for {GONE:.0f} s{doing}; the same command continues")

    def fail(self) -> bool:
        """Tells the others; True when this rank is the first, which is the one that speaks."""
        if self.directory is None:
            return True
        try:
            self._failure().touch(exist_ok=False)  # an empty file, for which a full disk has room too
        except FileExistsError:
            return False
        return True

    def failed_elsewhere(self) -> bool:
        """Whether another rank failed: then what went wrong here is a consequence."""
        return self.directory is not None and self._failure().exists()

    def gone(self) -> bool:
        """Whether a rank turns out to have failed or to answer no more; returns when its heartbeat has told.

        The thread that watches says so, here or on another rank.
        """
        until = time.monotonic() + GONE + GRACE
        while not self.failed_elsewhere() and self.directory is not None and time.monotonic() < until:
            time.sleep(BEAT / 10)
        return self.failed_elsewhere()

    def leave(self) -> None:
        """The others no longer expect this rank's heartbeat."""
        if self.directory is not None:
            (self.directory / f"{self.session}.left-{self.rank}").touch()
            self.ended.set()

    def _failure(self) -> Path:
        assert self.directory is not None
        return self.directory / f"{self.session}.failure"

    def _beat(self, rank: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{self.session}.beat-{rank}"

    def _watched(self) -> range:
        return range(1, self.world) if self.rank == 0 else range(1)

    def _silent(self, rank: int) -> bool:
        """Whether a rank's beat has not changed for GONE seconds of our own clock (those of nodes differ)."""
        assert self.directory is not None
        now, beat = time.monotonic(), self._beat(rank)
        changed = beat.stat().st_mtime_ns if beat.exists() else 0
        last, when = self.seen.get(rank, (-1, now))
        if changed != last:
            when = now
        self.seen[rank] = (changed, when)
        return now - when > GONE and not (self.directory / f"{self.session}.left-{rank}").exists()

    def _watch(self) -> None:
        """The daemon thread: beats, and ends the process when a peer is gone and the main thread does not notice."""
        last, since = time.monotonic(), 0.0
        while not self.ended.wait(BEAT):
            self._beat(self.rank).touch()
            now = time.monotonic()
            if now - last > GONE / 2:  # this process was suspended: what it did not see is not the others' fault
                self.seen.clear()
            last = now
            if self._failure().exists():
                since = since or now
                if now - since > GRACE:
                    os._exit(1)
            elif gone := [rank for rank in self._watched() if self._silent(rank)]:
                sentence = f"rank {gone[0]} has not answered for {GONE:.0f} s; the same command continues"
                if self.fail():
                    print(f"fusion: {sentence}", file=sys.stderr, flush=True)


def broken(error: BaseException) -> bool:
    """Whether a collective ended with this error, which another rank may have caused."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def of_environment(environ: dict[str, str] | os._Environ[str]) -> Ranks:
    """Rank, local rank and world size as a launcher says them; alone when no launcher does.

    SLURM's and Open MPI's names count only where RANK is absent, and are handed on as RANK, LOCAL_RANK, WORLD_SIZE.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    others = (
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),  # STEP: set by srun, not in a batch script
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    )
    if "RANK" not in environ:
        for theirs in others:
            if all(name in environ for name in theirs) and int(environ[theirs[2]]) > 1:
                if "MASTER_ADDR" not in environ:
                    raise ValueError(f"{theirs[0]} is set but MASTER_ADDR is not: export the first node's name as it")
                environ.update({ours: environ[name] for ours, name in zip(names, theirs, strict=True)})
                environ.setdefault("MASTER_PORT", "29500")
                break
    rank, local, world = (int(environ.get(name, default)) for name, default in zip(names, "001", strict=True))
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}: the launcher's environment is not whole")
    return Ranks(rank, local, world)


def join(folder: Path, environ: dict[str, str] | os._Environ[str]) -> Ranks:
    """All ranks meet below `folder`: a three-way handshake, so that files of an earlier launch fool nobody.

    Rank r says hello with a nonce; rank 0 answers with its own nonce and those it heard; r acknowledges.
    Raises ValueError on the ranks that find nobody: their file system is not shared.
    """
    ranks = of_environment(environ)
    if ranks.world == 1:
        return ranks
    address = f"{environ.get('MASTER_ADDR', '')}-{environ.get('MASTER_PORT', '')}".replace("/", "_")
    meeting = folder / ".ranks" / address
    meeting.mkdir(parents=True, exist_ok=True)
    nonce = uuid.uuid4().hex[:12]
    deadline = time.monotonic() + MEET
    everyone = range(1, ranks.world)
    mine: dict[str, Any] = {"nonce": nonce, "host": socket.gethostname()}
    claimed = False
    if ranks.rank == 0:
        while True:
            heard = {str(rank): (_read(meeting / f"hello-{rank}") or {}).get("nonce") for rank in everyone}
            claimed = _claim(meeting / "session", {**mine, "heard": heard}, claimed, 0)
            missing = [rank for rank in everyone if _read(meeting / f"acknowledged-{rank}") != nonce]
            if not missing:
                break
            _in_time(deadline, f"{len(missing)} of {ranks.world} ranks (the first is {missing[0]})", meeting)
        for old in meeting.iterdir():  # files of earlier launches
            if "." in old.name and not old.name.startswith(nonce):
                old.unlink(missing_ok=True)
        session = nonce
    else:
        while True:
            claimed = _claim(meeting / f"hello-{ranks.rank}", mine, claimed, ranks.rank)
            said = _read(meeting / "session") or {}
            if said and said["heard"].get(str(ranks.rank)) == nonce:
                session = said["nonce"]
                _write(meeting / f"acknowledged-{ranks.rank}", session)
                break
            _in_time(deadline, "rank 0", meeting)
    joined = Ranks(ranks.rank, ranks.local, ranks.world, meeting, session)
    joined._beat(ranks.rank).touch()
    threading.Thread(target=joined._watch, name="heartbeat", daemon=True).start()
    return joined


def _claim(path: Path, mine: dict[str, Any], claimed: bool, rank: int) -> bool:
    """Writes what this rank says there, over what it said before; ValueError when another process does so, too."""
    there = _read(path)
    other = there if claimed and there is not None and there["nonce"] != mine["nonce"] else None
    other = other or _read(path.with_name(f"{mine['nonce']}.rival"))
    if other is not None:
        _write(path.with_name(f"{other['nonce']}.rival"), mine)  # which may have seen nobody yet
        raise ValueError(
            f"two processes call themselves rank {rank}, on {other['host']} and on {mine['host']}: every node needs a "
            f"--machine_rank or --node_rank of its own, and every run that goes on at the same time an --out of its own"
        )
    _write(path, mine)
    return True


def _in_time(deadline: float, who: str, meeting: Path) -> None:
    if time.monotonic() > deadline:
        host = socket.gethostname()
        raise ValueError(
            f"{host} has not seen {who} in {meeting} for {MEET:.0f} s; "
            "--out must be on a file system that all ranks share"
        )
    time.sleep(0.05)


def _read(path: Path) -> Any:
    """The JSON in a file, None when there is none; writers rename, so it is never half."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")  # processes of two nodes may have one number
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
