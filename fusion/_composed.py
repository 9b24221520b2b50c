"""Models that are put together when they are read: an adapter or a compressed task vector on its base, shards of a
training checkpoint.

A merge reads them in place, region by region; whatever else wants a directory gets one, written once into the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusion import _sharded
from fusion._adapter_files import is_adapter, read_adapter
from fusion._files import file_digest
from fusion._once import made_once
from fusion._say import nearest

if TYPE_CHECKING:
    from fusion.checkpoint import Source
    from fusion.recipe import ModelRef

COMPOSED = ("adapter", "sharded", "compressed")
CHUNK = 1 << 22  # elements held in memory while writing


def kind_of(directory: Path) -> str:
    """One of COMPOSED, or directory: a checkpoint in one piece, or what is none."""
    if is_adapter(directory):
        return "adapter"
    if (directory / "compression.json").is_file():
        return "compressed"
    sharded = directory.is_dir() and not any(directory.glob("*.safetensors")) and _sharded.find(directory)
    return "sharded" if sharded else "directory"


def check(place: str, name: str, ref: ModelRef, folder: Path, models: Mapping[str, ModelRef]) -> None:
    """ValueError, with the place, unless headers say that the reference and its base go together.

    A base that is not a directory yet (on the hub, to be converted) is checked when it is one.
    """
    from fusion import sources

    directory = sources.local(ref, folder)
    if ref.base is None:
        if is_adapter(directory):
            raise ValueError(f"{place}: {directory} is a PEFT adapter; name the model it sits on: base: NAME")
        if kind_of(directory) == "compressed":
            raise ValueError(f"{place}: {directory} is a compressed task vector; name the model it is on: base: NAME")
    elif ref.base not in models:
        raise ValueError(f"{place}: base: no model is called '{ref.base}'{nearest(ref.base, models)}")
    else:
        chain = [name, ref.base]
        while chain[-1] in models and (below := models[chain[-1]].base) is not None:
            if below in chain:
                raise ValueError(f"{place}: base: {' -> '.join([*chain, below])} goes round in a circle")
            chain.append(below)
        kind = sources.check(ref.base, models[ref.base], folder, models)
    if ref.hub is not None:
        return
    try:
        if ref.base is None:
            open_composed(directory, None)
        elif kind == "directory":
            from fusion.checkpoint import Checkpoint

            open_composed(directory, Checkpoint.open(sources.local(models[ref.base], folder)))
        elif is_adapter(directory):
            read_adapter(directory)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def open_composed(directory: Path, base: Source | None) -> Source:
    """The model that lies in `directory` and `base` together, headers read and checked, as a Source."""
    if is_adapter(directory):
        from fusion._adapters import open_adapter

        return open_adapter(directory, base)
    if kind_of(directory) == "compressed":
        from fusion._compressed import open_compressed

        return open_compressed(directory, base)
    return _sharded.open_sharded(directory, base)


def source(
    name: str,
    ref: ModelRef,
    cache: Path,
    folder: Path,
    texts: Callable[[str], Iterable[str]],
    seed: int,
    models: Mapping[str, ModelRef],
) -> Source:
    """Model `name` to be read by region: an adapter on its base and a training checkpoint in place, without a copy.

    The arguments are those of `sources.resolve`.
    """
    from fusion import sources
    from fusion.checkpoint import Checkpoint

    if sources.check(name, ref, folder, models) not in COMPOSED:
        return Checkpoint.open(sources.resolve(name, ref, cache, folder, texts, seed, models))
    below = source(ref.base, models[ref.base], cache, folder, texts, seed, models) if ref.base else None
    place = ref.place or f"models.{name}"
    return open_composed(sources.local(ref, folder) if ref.hub is None else sources.download(place, ref), below)


def homes(source: Source) -> list[Path]:
    """The directories where a model's tokenizer and configuration may lie, the nearest first."""
    from fusion._adapters import Adapted
    from fusion._names import Renamed

    if isinstance(source, Renamed):
        return homes(source.model)
    if isinstance(source, Adapted):
        return [source.path, *homes(source.base)]
    return [source.path, source.home] if isinstance(source, _sharded.Sharded) else [source.path]


def written(source: Source, cache: Path) -> Path:
    """The source as a directory in the cache, named by the digest of all that it is read from; written once.

    Numbers stay what reading delivers: float32 where an adapter adds to the base, the master weights of ZeRO.
    """
    from fusion._carry import FILES

    beside = [next((h / name for h in homes(source) if (h / name).is_file()), None) for name in FILES]
    carried = [file for file in beside if file is not None]
    parts = [[file.name, file_digest(file)] for file in (*source.files, *carried)]
    text = json.dumps([parts, source.config, sorted(source.entries)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        _write(source, folder)
        (folder / "config.json").write_text(json.dumps(source.config, indent=2, sort_keys=True) + "\n")
        for file in carried:
            shutil.copyfile(file, folder / file.name)
        note = {"path": str(source.path), "files": parts}
        (folder / "source.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    return made_once(cache / f"composed-{digest}", make)


def _write(source: Source, folder: Path) -> None:
    """All tensors of the source in one safetensors file, a chunk at a time."""
    from fusion.checkpoint import Writer, region, shard

    whole = (shard("model.safetensors", list(source.entries.values())),)
    Writer.create(folder, whole)
    writer = Writer(folder, whole)
    for name, entry in source.entries.items():
        for start in range(0, entry.numel, CHUNK):
            writer.write(name, start, region(source, name, start, min(start + CHUNK, entry.numel)))
    writer.sync()
    writer.close()
