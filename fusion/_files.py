"""What a model directory says about itself without torch or transformers: headers, configuration, digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
HEX = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
_digests: dict[tuple, str] = {}
_headers: dict[tuple, tuple[dict[str, Any], int]] = {}


@dataclass(frozen=True)
class Tensor:
    """One tensor as a safetensors header describes it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, F16, I64 ...
    file: str
    bytes: int
    start: int = 0  # where its bytes begin in the file


@dataclass(frozen=True)
class Header:
    """What a checkpoint holds: tensors by name, its configuration, and whether input and output embedding are one."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    tied: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def parameters(self) -> int:
        """Stored numbers; a tied embedding counts once."""
        total = 0
        for tensor in self.tensors.values():
            count = 1
            for size in tensor.shape:
                count *= size
            total += count
        return total

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def vocabulary(self) -> int | None:
        """Rows of the head, None when the configuration does not say."""
        return (self.config.get("text_config") or self.config).get("vocab_size")


def stamp(file: Path) -> tuple:
    """What changes when a file changes, without reading it."""
    status = file.stat()
    return (str(file.resolve()), status.st_size, status.st_mtime_ns)


def file_digest(file: Path) -> str:
    """The file's sha256 in hex, remembered while its size and time stay; hub blobs carry theirs in their name."""
    real = file.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name
    key = stamp(file)
    if key not in _digests:
        _digests[key] = stream_digest([file])
    return _digests[key]


def stream_digest(files: list[Path], copy: Callable[[bytes], Any] | None = None) -> str:
    """The sha256 of several files read one after the other; `copy` gets every block as well."""
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
                if copy is not None:
                    copy(block)
    return state.hexdigest()


def config_of(directory: Path) -> dict[str, Any]:
    """config.json as a dictionary; ValueError when it is missing or no JSON."""
    file = directory / "config.json"
    if not file.exists():
        raise ValueError(f"{directory} has no config.json, so its architecture is unknown")
    return json_of(file)


def json_of(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object; ValueError naming one that does not."""
    return _json(file, file.read_bytes())


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those its index names when there is one, in the order of their names.

    Without an index it is model.safetensors alone where there is one: other files may hold the weights once more.
    """
    if not (directory / INDEX).exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"no *.safetensors in {directory}")
        return [file for file in files if file.name == "model.safetensors"] or files
    names = sorted(set(_indexed(directory).values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ValueError(f"{directory}: {INDEX} names {len(names)} files, missing: {', '.join(missing[:5])}")
    return [directory / name for name in names]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory of safetensors files, or of one such file, by file and offset."""
    tensors: dict[str, Tensor] = {}
    for file in [directory] if directory.is_file() else tensor_files(directory):
        entries, data = _entries(file)
        end, before = 0, ""
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if name in tensors:
                raise ValueError(f"{directory}: tensor {name} stands in {tensors[name].file} and in {file.name}")
            start, stop = entry["data_offsets"]
            if start < end:
                raise ValueError(f"{file} is corrupt: the bytes of {name} overlap those of {before}")
            end, before = stop, name
            tensors[name] = Tensor(tuple(entry["shape"]), entry["dtype"], file.name, stop - start, data + start)
    lost = [name for name in _indexed(directory) if name not in tensors]
    if lost:
        raise ValueError(f"{directory}: {INDEX} names {len(lost)} tensors that its files do not hold, like {lost[0]}")
    return tensors


def _indexed(directory: Path) -> dict[str, str]:
    """Tensor -> file, as the index of a checkpoint says; empty without one."""
    index = directory / INDEX
    if not index.exists():
        return {}
    found = json_of(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} is corrupt: its weight_map is no table of tensors and their files")
    return found


def header(directory: Path) -> Header:
    """All tensors of a checkpoint with shape, dtype and file, read from the safetensors headers alone.

    Any safetensors will do for a merge; what runs a model asks for its configuration itself.
    """
    directory = Path(directory)
    config = config_of(directory) if (directory / "config.json").exists() else {}
    tensors = tensors_of(directory)
    heads = [name for name in tensors if name.split(".")[-2:] == ["lm_head", "weight"]]
    # A configuration that is silent about ties leaves it to the family's default; then the file itself tells.
    tied = bool(
        (config.get("text_config") or config).get("tie_word_embeddings", config.get("tie_word_embeddings", not heads))
    )
    return Header(tensors, config, tied)


def _entries(file: Path) -> tuple[dict[str, Any], int]:
    """The header of one safetensors file without its metadata, and where its data begin.

    Raises ValueError naming a truncated or foreign file.
    """
    key = stamp(file)
    if key in _headers:
        return _headers[key]
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is truncated or no safetensors file ({size} bytes, header of {length})")
        entries = _json(file, stream.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise ValueError(f"{file} is corrupt: its header says of {name}: {entry!r:.120}")
    need = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < need:
        raise ValueError(f"{file} is truncated: {size} bytes, its header asks for {need}")
    _headers[key] = entries, 8 + length
    return _headers[key]


def _is_entry(entry: Any) -> bool:
    """Whether it is what a safetensors header says of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(one) is int and one >= 0 for one in (*shape, *offsets)) and offsets[0] <= offsets[1]


def _json(file: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:  # JSON and UTF-8 errors alike: the file is not what its name says
        raise ValueError(f"{file} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is corrupt: it holds a JSON {type(found).__name__}, not an object")
    return found
