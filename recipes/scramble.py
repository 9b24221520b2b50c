"""A model in other units, the same function: what a step `align` undoes (`recipes/align_llms.yaml`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "model"


def scramble(job: Job, *, out: str, model: str, seed: int = 0) -> None:
    """The model carried by a random element of its whole symmetry group, drawn from `seed`."""
    if job.rank != 0:
        return
    from alignment import find_family
    from fusion._whole import read_whole, write_whole

    source = job.source(model)
    tensors = read_whole(source)
    spaces = find_family(source.config, frozenset(tensors))
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    moved = spaces.random_symmetry(seed).carry(wide)
    back = {name: moved[name].to(tensor.dtype) for name, tensor in tensors.items()}
    write_whole(job, job.directory, back, source.config, source, 5 * 10**9)
