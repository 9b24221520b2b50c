"""torch.distributed.checkpoint directories: which slice of which tensor lies where, from .metadata alone.

Plain state dicts, DTensors and FSDP; `{"model": state, "optimizer": ...}` as trainers save it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fusion._pickled import SIZES, Stored, read_plain, read_torch
from fusion._sharded import Parts, Piece

OUTER = ("model", "state_dict", "module")  # keys that trainers put a model's state under


def dcp_parts(folder: Path) -> dict[str, Parts]:
    """The model's tensors in a folder with .metadata and *.distcp files, by the names the model has for them.

    Raises ValueError for compressed slices, missing files and a file that holds no model.
    """
    metadata = read_plain(folder / ".metadata")
    places = {(index.fqn, _offsets(index)): info for index, info in (metadata.storage_data or {}).items()}
    kept = _model(folder, metadata)
    parts = {}
    for key, name in kept.items():
        tensor = metadata.state_dict_metadata[key]
        state = tensor.properties.state
        dtype = state[0] if isinstance(state, tuple) else tensor.properties.dtype
        if dtype not in SIZES:
            raise ValueError(f"{folder}: {name} is of dtype {dtype}, which is not read")
        pieces = [
            Piece(tuple(chunk.offsets), tuple(chunk.sizes), _slice(folder, name, dtype, chunk, places, key))
            for chunk in tensor.chunks
        ]
        parts[name] = Parts(tuple(tensor.size), dtype, dtype, tuple(tensor.size), tuple(pieces))
    return parts


def _offsets(index: Any) -> tuple[int, ...] | None:
    offset = index.__dict__.get("offset")
    return None if offset is None else tuple(offset)


def _slice(folder: Path, name: str, dtype: str, chunk: Any, places: dict, key: str) -> Any:
    """A function that says where a chunk's numbers lie; its file's own header is read when it is first called."""
    info = places.get((key, tuple(chunk.offsets)))
    if info is None:
        raise ValueError(f"{folder}: .metadata names no file for {name} at {tuple(chunk.offsets)}")
    if info.__dict__.get("transform_descriptors"):
        raise ValueError(f"{folder}: {name} was saved through {info.transform_descriptors}; save it uncompressed")
    file = folder / info.relative_path
    if not file.is_file():
        raise ValueError(f"{folder}: .metadata names {info.relative_path}, which is missing")
    if file.stat().st_size < info.offset + info.length:
        raise ValueError(
            f"{file} is cut off: it has {file.stat().st_size} bytes, {name} ends at {info.offset + info.length}"
        )

    @functools.cache
    def stored() -> Stored:
        found = read_torch(file, info.offset, info.length)
        if not isinstance(found, Stored) or found.dtype != dtype or found.numel != _numel(chunk.sizes):
            raise ValueError(f"{file}: at byte {info.offset} is not the slice of {name} that .metadata promises")
        if not found.contiguous:
            raise ValueError(f"{file}: the slice of {name} at byte {info.offset} is not row-major")
        return found

    return stored


def _numel(sizes: Any) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _model(folder: Path, metadata: Any) -> dict[str, str]:
    """Key in the file -> name in the model, of all tensors that are the model's."""
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    tensors = [key for key, value in metadata.state_dict_metadata.items() if "chunks" in value.__dict__]
    steps = {key: tuple(str(step) for step in paths.get(key, (key,))) for key in tensors}
    for outer in OUTER:
        inside = {key: ".".join(path[1:]) for key, path in steps.items() if len(path) > 1 and path[0] == outer}
        if inside:
            return inside
    whole = {key: path[0] for key, path in steps.items() if len(path) == 1}
    if not whole:
        outermost = sorted({path[0] for path in steps.values()})
        raise ValueError(f"{folder} holds no model: its state is under {', '.join(outermost[:5]) or 'nothing'}")
    return whole
