"""A task vector in one or two bits an entry, to be kept and sent instead of the model.

BitDelta's signs (Liu et al. 2024, arXiv:2402.10193) or ComPEFT's sparse ones (Yadav et al. 2023, arXiv:2311.13171).
"""

import shutil
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "a compressed task vector"
BUILDS = False
FOLDER = "task_vector"


def compress(
    job: "Job",
    *,
    out: str,
    model: str,
    base: str,
    method: Literal["one_bit", "compeft"] = "one_bit",
    params: dict[str, Any] | None = None,
) -> None:
    """A directory task_vector/ that is `model` again, as far as its bits go: `{path: .../task_vector, base: NAME}`."""
    if job.rank != 0:
        return
    from fusion._compressed import compress as write

    shutil.rmtree(job.directory / FOLDER, ignore_errors=True)
    source, below = job.source(model), job.source(base)
    made = write(method, source, below, job.directory / FOLDER, params)
    written = sum(file.stat().st_size for file in (job.directory / FOLDER).glob("compression.*"))
    stored = sum(entry.numel * entry.stored.itemsize for entry in source.entries.values())
    entries = sum(entry.numel for entry in made.entries.values())
    metrics = {"bytes": written, "bits_per_entry": 8 * written / entries, "times_smaller": stored / written}
    job.measured(metrics)
    job.log(**metrics)


def check(view: "View") -> None:
    """Raises ValueError, with the place, for parameters that the method can't take, and for a model and a base that do
    not go together as far as they are on this machine; `plan` calls it."""
    from fusion._compressed import check as checked
    from fusion._merge_check import headers_here
    from fusion._method import Method

    method = Method.of(view.fields["method"])
    given = method.check(view.fields["params"] or {}, 1, place=f"{view.place}.params")
    if method.scope(given) == "model":
        raise ValueError(f"{view.place}.params: scope is model, and task vectors are compressed tensor by tensor")
    model, base = (headers_here(view, view.fields[name]) for name in ("model", "base"))
    if model is not None and base is not None:
        try:
            checked(method, given, model, base)
        except ValueError as error:
            raise ValueError(f"{view.place}: {error}") from None
