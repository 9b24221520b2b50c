"""Training checkpoints as models: DeepSpeed ZeRO and torch.distributed.checkpoint directories, read slice by slice.

Nothing is consolidated: a region of a tensor is read from the files of the ranks that hold it.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion._files import config_of
from fusion._pickled import SIZES, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.checkpoint import Entry, Source


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, from index `offsets` on, and where its numbers lie, row-major (asked for when first read)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: Callable[[], Stored]


@dataclass(frozen=True)
class Parts:
    """A tensor as a training checkpoint holds it.

    `grid` is the shape that the pieces' boxes are in: the tensor's own, or (numel,) where it was cut up flat.
    """

    shape: tuple[int, ...]
    dtype: str  # of the numbers
    nominal: str  # of the model that was trained
    grid: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Sharded:
    """A Source whose tensors lie in pieces in the files of many ranks."""

    def __init__(self, path: Path, home: Path, parts: Mapping[str, Parts], files: tuple[Path, ...]):
        import torch

        from fusion.checkpoint import Entry

        self.path, self.home, self.parts, self.files = path, home, dict(parts), files
        self.config = config_of(home)
        self.entries: dict[str, Entry] = {}
        for name, part in sorted(parts.items()):
            held = sum(math.prod(piece.sizes) for piece in part.pieces)
            if held != part.numel:
                raise ValueError(f"{path}: {name} has {part.numel} numbers, its pieces hold {held}; files are missing")
            dtype, nominal = getattr(torch, part.dtype), getattr(torch, part.nominal)
            self.entries[name] = Entry(name=name, shape=part.shape, dtype=dtype, stored=nominal)
        self._files: dict[Path, Any] = {}

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        """Elements [start, stop) of the flattened tensor, into a 1-D buffer of the entry's dtype."""
        import torch

        part = self.parts[name]
        target = into.view(torch.uint8).numpy().data
        for piece in part.pieces:
            self._copy(part, piece, start, stop, target)

    def _copy(self, part: Parts, piece: Piece, start: int, stop: int, target: memoryview) -> None:
        """The runs of a piece that lie in [start, stop): what is consecutive in the tensor and in the file."""
        grid, item = part.grid, SIZES[part.dtype]
        axis = len(grid)  # the run's first axis: the ones after it are whole
        while axis > 0 and (axis == len(grid) or piece.sizes[axis] == grid[axis]):
            axis -= 1
        strides = [*accumulate(reversed(grid[1:]), lambda a, b: a * b, initial=1)][::-1] if grid else []
        length = math.prod(piece.sizes[axis:])
        outer = piece.sizes[:axis]
        origin = sum(o * s for o, s in zip(piece.offsets, strides))

        def begin(run: int) -> int:
            at = origin
            for size, stride in zip(reversed(outer), reversed(strides[:axis])):
                run, index = divmod(run, size)
                at += index * stride
            return at

        runs = range(math.prod(outer)) if length else range(0)
        first, last = bisect_right(runs, start - length, key=begin), bisect_left(runs, stop, key=begin)
        if first >= last:
            return
        stored = piece.stored()
        for run in range(first, last):
            here = begin(run)
            a, b = max(start, here), min(stop, here + length)
            place = stored.offset + (run * length + a - here) * item
            self._pread(stored.file, place, target[(a - start) * item : (b - start) * item])

    def _pread(self, file: Path, offset: int, target: memoryview) -> None:
        if file not in self._files:
            self._files.setdefault(file, file.open("rb"))
        done = 0
        while done < len(target):
            count = os.preadv(self._files[file].fileno(), [target[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{file} is cut off: nothing at byte {offset + done}")
            done += count


def find(directory: Path) -> tuple[str, Path] | None:
    """("zero", folder with the ranks' files) or ("dcp", folder with .metadata) of a directory, None if it has none."""
    directory = Path(directory)
    if (directory / ".metadata").is_file():
        return "dcp", directory
    if _has_zero(directory):
        return "zero", directory
    if (directory / "latest").is_file():
        return "zero", directory / (directory / "latest").read_text(encoding="utf-8").strip()
    inner = sorted(file.parent for file in directory.glob("*/.metadata"))
    models = [folder for folder in inner if "optim" not in folder.name] or inner
    return ("dcp", models[0]) if len(models) == 1 else None


def _has_zero(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


def files(directory: Path) -> list[Path]:
    """The files that a training checkpoint's weights depend on; ValueError when it has none."""
    found = find(directory)
    if found is None:
        raise ValueError(f"{directory} is no training checkpoint")
    kind, folder = found
    patterns = ("*_model_states.pt", "*_optim_states.pt") if kind == "zero" else (".metadata", "*.distcp")
    inside = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if len(inside) < 2:
        raise ValueError(f"{directory}: {folder} does not hold the files of a training checkpoint")
    return inside


def home(directory: Path, base: Path | None = None) -> Path:
    """Where a training checkpoint's config.json and tokenizer lie: beside it, or in the model that it is based on."""
    found = find(directory)
    beside = [directory] if found is None else [directory, found[1], found[1].parent]
    for folder in [*beside, *([base] if base is not None else [])]:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{directory} is a training checkpoint without config.json; name the model that was trained: "
        f"{{path: {directory}, base: NAME}}, or copy config.json and the tokenizer there"
    )


def open_sharded(directory: Path, base: Source | None = None) -> Sharded:
    """A ZeRO or torch.distributed.checkpoint directory as a Source.

    `base` is the model that was trained, whose config.json holds where there is none; ValueError when it is not it.
    """
    from fusion._dcp import dcp_parts
    from fusion._zero import zero_parts

    found = find(Path(directory))
    if found is None:
        raise ValueError(f"{directory} is no training checkpoint of DeepSpeed or torch.distributed.checkpoint")
    beside = home(Path(directory), None if base is None else base.path)
    config = config_of(beside)
    parts = without_wrappers(zero_parts(found[1]) if found[0] == "zero" else dcp_parts(found[1]), Path(directory))
    if (config.get("text_config") or config).get("tie_word_embeddings"):  # one tensor, as models are saved
        parts = {name: part for name, part in parts.items() if name.split(".")[-2:] != ["lm_head", "weight"]}
    if base is not None:
        _check_base(Path(directory), parts, base)
    return Sharded(Path(directory), beside, parts, tuple(files(Path(directory))))


def _check_base(directory: Path, parts: Mapping[str, Parts], base: Source) -> None:
    common = [name for name in parts if name in base.entries]
    if not common:
        raise ValueError(
            f"{directory} has tensors like {min(parts, default='none')}, {base.path} like {min(base.entries)}; "
            "this is not the model that was trained"
        )
    for name in common:
        here, there = parts[name].shape, base.entries[name].shape
        if here[1:] != there[1:] or len(here) != len(there) or (len(here) == 1 and here != there):  # rows: a vocabulary
            raise ValueError(
                f"{directory}: {name} has shape {here}, in {base.path} {there}; this is not the model that was trained"
            )


def without_wrappers(parts: Mapping[str, Parts], path: Path) -> dict[str, Parts]:
    """The tensors under the names they have without what training wraps around modules."""
    cleaned = {}
    for name, part in parts.items():
        steps = [step for step in name.split(".") if step not in WRAPPERS]
        if steps[0] == "module" and all(other.split(".")[0] == "module" for other in parts):
            steps = steps[1:]
        cleaned[".".join(steps)] = part
    if any(".lora_A." in name for name in cleaned):
        raise ValueError(
            f"{path} holds the training state of a PEFT adapter; give the directory with adapter_config.json, and base:"
        )
    return cleaned


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def slices(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of parts that follow each other."""
    ends = [*accumulate(sizes)]
    return list(zip([0, *ends[:-1]], ends))
