"""Steps for tests of the backbone: small, but they do what steps do (read inputs, write files, resume, divide work)."""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "targets"


def plugin_steps(
    job: "Job",
    *,
    out: str,
    targets: list[str] | None = None,
    parts: int = 4,
    seconds: float = 0.0,
    die_at: int = -1,
    how: Literal["kill", "sentence", "fault"] = "kill",
    on_rank: int = 0,
    train: dict[str, Any] | None = None,
) -> None:
    """Writes `parts` files, rank r every world-th, each after `seconds`; those that are there are kept."""
    read = [(job.store(name) / "total").read_text() for name in targets or ()]
    for part in job.progress(range(parts), "parts"):
        file = job.directory / f"part-{part}"
        if part % job.world != job.rank or file.exists():
            continue
        marker = Path(os.environ.get("FUSION_TEST_DIED", "/nonexistent"))
        if part == die_at and job.rank == on_rank and not marker.exists():
            if marker.parent.is_dir():
                marker.touch()
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "sentence":
                raise ValueError(f"part {part} can't be made")
            raise KeyError(part)
        time.sleep(seconds)
        file.write_text(f"{part} by process {os.getpid()}")
    if job.rank == 0:
        job.wait(lambda: all((job.directory / f"part-{part}").exists() for part in range(parts)), "all parts")
        (job.directory / "total").write_text("+".join([*read, str(parts)]))
        (job.directory / "fields").write_text(repr((out, train, job.device)))
        job.log(parts=parts)


def train_fields() -> set[str]:
    """The names that `train` may hold."""
    return {"learning_rate", "max_steps", "use_cpu", "bf16"}
