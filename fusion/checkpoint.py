"""Checkpoints read by region and written by region: headers first, then `pread` and `pwrite` at known offsets."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fusion import sources
from fusion._files import config_of, tensors_of
from fusion._libc import begin_writing
from fusion.merge._compiled import loops

# A dtype as safetensors writes it.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 22  # bytes read at a time for a checksum
SOON = 1 << 19  # bytes that are worth a call to have the disk write them


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: `dtype` is what `read` delivers, `stored` what the model is nominally in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Source(Protocol):
    """A model that can be read by region; `entries` stand in the order in which reading them is fastest."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...
    @property
    def files(self) -> tuple[Path, ...]: ...  # every file that its tensors are read from

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        """Elements [start, stop) of the flattened tensor, in the entry's dtype, into a 1-D buffer of that size."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files; reading is thread-safe and copies nothing but into the buffer given."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    files: tuple[Path, ...]
    places: dict[str, tuple[int, int]]  # name -> (descriptor, offset of its first byte)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """A directory, or one safetensors file without a configuration; headers only are read.

        Raises ValueError naming a truncated, corrupt or foreign file.
        """
        path = Path(path)
        directory = path.parent if path.is_file() else path
        tensors = tensors_of(path)
        files = list(dict.fromkeys(tensor.file for tensor in tensors.values()))
        entries: dict[str, Entry] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{directory / tensor.file}: {name} is stored as {tensor.dtype}, which can't be read")
            entry = Entry(name, tensor.shape, DTYPES[tensor.dtype], DTYPES[tensor.dtype])
            if entry.numel * entry.dtype.itemsize != tensor.bytes:
                shape = " x ".join(map(str, tensor.shape)) or "scalar"
                raise ValueError(
                    f"{directory / tensor.file} is corrupt: {name} ({shape}, {tensor.dtype}) has {tensor.bytes} bytes "
                    f"and needs {entry.numel * entry.dtype.itemsize}"
                )
            entries[name] = entry
        descriptors = {file: os.open(directory / file, os.O_RDONLY) for file in files}
        places = {name: (descriptors[tensor.file], tensor.start) for name, tensor in tensors.items()}
        settings = config_of(path) if (path / "config.json").is_file() else {}
        return cls(path, settings, entries, tuple(directory / file for file in files), places)

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        descriptor, offset = self.places[name]
        view = into.view(torch.uint8).numpy().data
        place = offset + start * into.element_size()
        while view:
            count = os.preadv(descriptor, [view], place)
            if count == 0:
                raise ValueError(f"{self.path}: the file of {name} has become shorter while it was read")
            view, place = view[count:], place + count
        # the next region comes from the disk while this one is computed with
        os.posix_fadvise(descriptor, place, into.nbytes, os.POSIX_FADV_WILLNEED)

    def read_finite(self, name: str, start: int, stop: int, into: Tensor) -> bool:  # (stop - start,) float32
        """Reads bfloat16 as float32 in one go; False, and nothing to rely on, where something is not finite, and for
        whatever else is left to `read`."""
        compiled = loops(into) if self.entries[name].dtype == torch.bfloat16 else None
        if compiled is None:
            return False
        descriptor, offset = self.places[name]
        place, size = offset + 2 * start, 2 * (stop - start)
        finite = compiled.read_finite(descriptor, place, stop - start, into.data_ptr())
        os.posix_fadvise(descriptor, place + size, size, os.POSIX_FADV_WILLNEED)
        return bool(finite)

    def __del__(self) -> None:
        for descriptor in {descriptor for descriptor, _ in self.places.values()}:
            os.close(descriptor)


def open_source(directory: Path | str, base: Source | None = None) -> Source:
    """The model of a directory, whatever it is written as; `base` is what an adapter sits on.

    Raises ValueError for what is no model, and for pickled weights with the command that converts them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        there = "; it is a file, give the directory that it lies in" if directory.exists() else ""
        raise ValueError(f"there is no directory {directory}{there}")
    if (directory / "adapter_config.json").is_file():
        from fusion._adapters import open_adapter

        return open_adapter(directory, base)
    if (directory / "compression.json").is_file():
        from fusion._compressed import open_compressed

        return open_compressed(directory, base)
    if not any(directory.glob("*.safetensors")):
        from fusion import _sharded

        if _sharded.find(directory) is not None:
            return _sharded.open_sharded(directory, base)
        sources.refuse_pickled(directory)
    return Checkpoint.open(directory)


def region(source: Source, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """(stop - start,) of the flattened tensor, in its dtype; all of it when nothing is said."""
    entry = source.entries[name]
    out = torch.empty((entry.numel if stop is None else stop) - start, dtype=entry.dtype)
    source.read(name, start, start + len(out), out)
    return out


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Shard:
    """One file to be written: its header, and where each tensor's bytes begin."""

    file: str
    header: bytes
    size: int
    places: dict[str, int]


def layout(entries: Iterable[Entry], shard_size: int) -> tuple[Shard, ...]:
    """The files that hold these tensors, in the natural order of their names, none larger than `shard_size` bytes
    unless one tensor is; the same whatever order they come in."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in sorted(entries, key=lambda entry: natural(entry.name)):
        size = entry.numel * entry.dtype.itemsize
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    count = len(groups)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )
    return tuple(shard(file, group) for file, group in zip(names, groups, strict=True))


def shard(file: str, group: list[Entry]) -> Shard:
    """Wider dtypes come first, so that every tensor is aligned."""
    offsets: dict[str, int] = {}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in sorted(group, key=lambda entry: (-entry.dtype.itemsize, natural(entry.name))):
        offsets[entry.name] = end
        stop = end + entry.numel * entry.dtype.itemsize
        table[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, stop]}
        end = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, len(header) + end, {name: len(header) + start for name, start in offsets.items()})


class Writer:
    """Files of known size that are written by region, in any order, by any number of threads and processes."""

    def __init__(self, directory: Path, shards: Iterable[Shard]) -> None:
        self.descriptors: list[int] = []
        self.places: dict[str, tuple[int, int]] = {}
        for shard in shards:
            descriptor = os.open(directory / shard.file, os.O_RDWR)
            self.descriptors.append(descriptor)
            self.places |= {name: (descriptor, start) for name, start in shard.places.items()}

    @staticmethod
    def create(directory: Path, shards: Iterable[Shard]) -> None:
        """The files with their headers, their space reserved."""
        for shard in shards:
            with open(directory / shard.file, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shard.size)
                file.write(shard.header)

    def write(self, name: str, start: int, values: Tensor) -> None:  # (n,) contiguous, in the tensor's dtype
        """Puts elements [start, start + n) of a tensor where they belong."""
        descriptor, offset = self.places[name]
        view = values.view(torch.uint8).numpy().data
        first = place = offset + start * values.element_size()
        while view:
            count = os.pwrite(descriptor, view, place)
            view, place = view[count:], place + count
        if place - first >= SOON:
            begin_writing(descriptor, first, place - first)

    def checksum(self, name: str, start: int, stop: int) -> str:  # bytes of the tensor
        """32 hex digits (xxh3-128) of what the file holds now."""
        import xxhash

        descriptor, offset = self.places[name]
        state = xxhash.xxh3_128()
        buffer = bytearray(min(PIECE, stop - start))
        while start < stop:
            view = memoryview(buffer)[: stop - start]
            count = os.preadv(descriptor, [view], offset + start)
            if count == 0:
                return ""
            state.update(view[:count])
            start += count
        return str(state.hexdigest())

    def sync(self) -> None:
        """Returns when the disk has it all."""
        for descriptor in self.descriptors:
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
