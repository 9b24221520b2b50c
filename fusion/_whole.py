"""A checkpoint whole in memory: all of its tensors read, and written again with what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.checkpoint import Source
    from fusion.job import Job


def read_whole(source: Source) -> dict[str, Tensor]:
    """All tensors of a model, by name."""
    from fusion.checkpoint import region

    return {name: region(source, name).view(entry.shape) for name, entry in source.entries.items()}


def write_whole(
    job: Job,
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: Source,
    shard_size: int,
) -> None:
    """The checkpoint in a directory, with the tokenizer and what else lies beside the weights of `source`."""
    from fusion._carry import carry
    from fusion.checkpoint import Entry, Writer, layout

    shards = layout([Entry(name, tuple(t.shape), t.dtype, t.dtype) for name, t in tensors.items()], shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    Writer.create(directory, shards)
    writer = Writer(directory, shards)
    for name in job.progress(list(tensors), f"{job.name}: tensors"):
        writer.write(name, 0, tensors[name].contiguous().flatten())
    writer.sync()
    writer.close()
    carry(directory, config, shards, source, source)
