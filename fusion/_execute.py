"""One step from its plan to an immutable directory: prepared, run by all ranks, sealed by rank 0, renamed once.

OUT-KEY8.partial/   work; step.json is there from the start; a later run continues in it
OUT-KEY8/           the same directory, renamed after done.json was written: what has this name is whole
"""

import fcntl
import json
import os
import platform
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fusion import __version__, _keys, words
from fusion._architectures import refuse_own_code
from fusion._files import config_of, file_digest
from fusion._machine import Machine, arguments
from fusion._ranks import Ranks
from fusion._say import duration
from fusion.job import Job, resolve_model, source_model
from fusion.plan import Plan, Planned

Tell = Callable[..., None]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors")


def execute(planned: Planned, plan: Plan, machine: Machine, ranks: Ranks, tell: Tell) -> None:
    """Runs a step unless its directory is there; returns when it is, on every rank."""
    final = planned.directory
    partial = final.with_name(f"{final.name}.partial")
    sealed = final / "done.json"
    if ranks.rank > 0:
        begun = partial / f"begun-{ranks.session}"
        ranks.wait(lambda: begun.exists() or sealed.exists(), f"rank 0 to begin {planned.name}")
        if not sealed.exists():
            with ExitStack() as after:
                _call(planned, plan, partial, machine, ranks, after)
                (partial / f"ended-{ranks.session}-{ranks.rank}").touch()
                ranks.wait(sealed.exists, f"rank 0 to finish {planned.name}")
        return
    if sealed.exists():
        check_whole(final)
        tell(f"{planned.name}: done before ({final})")
        return
    with _lock(final.with_name(f".{final.name}.lock")):
        if sealed.exists():  # another run made it while this one waited
            return
        continues = _prepare(planned, final, partial)
        tell(f"{planned.name}: {planned.step.verb}{' continues' if continues else ''} in {partial}")
        built = planned.built({one.name: one for one in plan.steps})
        here = {name: plan[name].directory for name in planned.inputs}
        for name in planned.models:  # once, before the others look for it; weights alone are read in place
            if name in built:
                here[name] = resolve_model(plan.recipe, name, _keys.cache_directory())
            else:
                source_model(plan.recipe, name, _keys.cache_directory())
        for name in built:
            if (here[name] / "config.json").is_file():  # planning did not see what was downloaded
                refuse_own_code(planned.step.place, name, config_of(here[name]))
        (partial / f"begun-{ranks.session}").touch()
        start = time.monotonic()
        with ExitStack() as after:
            _call(planned, plan, partial, machine, ranks, after)
            ended = [partial / f"ended-{ranks.session}-{rank}" for rank in range(1, ranks.world)]
            # a slow rank with nothing to do may still look into the directory, which is about to change its name
            ranks.wait(lambda: all(one.exists() for one in ended), f"the other ranks to finish {planned.name}")
            ranks.check(planned.name)
            _seal(planned, final, partial, time.monotonic() - start)
        tell(f"{planned.name}: done in {duration(time.monotonic() - start)}")


def _call(planned: Planned, plan: Plan, directory: Path, machine: Machine, ranks: Ranks, after: ExitStack) -> None:
    """The step's function, on this rank."""
    recipe = plan.recipe
    given = arguments(planned, machine)
    cpu = (given.get("train") or {}).get("use_cpu", False) if "train" in planned.word.names else False
    job = Job(
        name=planned.name,
        directory=directory,
        recipe=recipe,
        seed=recipe.seed,
        rank=ranks.rank,
        world=ranks.world,
        device="cpu" if cpu else machine.device,
        place=planned.step.place,
        outputs={name: plan[name].directory.resolve() for name in planned.inputs},
        cache=_keys.cache_directory(),
        ranks=ranks if ranks.world > 1 else None,
        after=after,
    )
    try:
        words.load("steps", planned.step.verb)(job, **given)
    except Exception:
        # Users see a sentence alone; whoever has to find a fault in a library finds where it came from here.
        with suppress(OSError):  # of a full disk, say, which is what went wrong
            (directory / f"traceback-{ranks.rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _prepare(planned: Planned, final: Path, partial: Path) -> bool:
    """The partial directory with its step.json; whether an earlier run began it."""
    if final.exists() and not partial.exists():  # without done.json: somebody took it away
        os.rename(final, partial)
    continues = (partial / "step.json").exists()
    partial.mkdir(parents=True, exist_ok=True)
    for old in [*partial.glob("begun-*"), *partial.glob("ended-*"), *partial.glob("traceback-*.txt")]:
        old.unlink()
    if not continues:
        step = planned.step
        about = {
            "verb": step.verb,
            "out": step.out,
            "fields": planned.fields,
            "key": planned.key,
            "inputs": planned.inputs,
            "models": list(planned.models),
            "data": list(planned.data),
            "place": step.place,
            "versions": versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
        }
        write_json(partial / "step.json", about)
    return continues


def _seal(planned: Planned, final: Path, partial: Path, seconds: float) -> None:
    """Lists what was written, writes done.json and gives the directory its name."""
    for old in [*partial.glob("begun-*"), *partial.glob("ended-*")]:
        old.unlink()
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file != partial / "done.json")
    listing = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files
    }
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(partial / "done.json", {"finished": finished, "seconds": round(seconds, 3), "files": listing})
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    symlink(final.with_name(planned.name), final.name)


def check_whole(directory: Path) -> None:
    """ValueError when a finished step's files are not those that its done.json lists."""
    listing = json.loads((directory / "done.json").read_text(encoding="utf-8"))["files"]
    for name, entry in listing.items():
        file = directory / name
        size = file.stat().st_size if file.exists() else None
        if size != entry["bytes"]:
            now = "is gone" if size is None else f"has {size} bytes"
            raise ValueError(f"{file} {now}, {entry['bytes']} were written; delete {directory} to make it again")


def symlink(link: Path, target: str) -> None:
    """A relative link, replaced in one move."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is in the way: a link to {target} belongs there")
    temporary = link.with_name(f".{link.name}.{os.getpid()}.new")
    temporary.symlink_to(target)
    os.replace(temporary, link)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Of this package, of Python and of the libraries that decide numbers."""
    found = {"fusion": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One run at a time writes a step's directory. The kernel lets go of the lock when its process dies, however."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, not of forked workers that outlive it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip()
            raise ValueError(f"{path.parent}: another run ({who}) makes this step; wait for it or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        path.unlink(missing_ok=True)
