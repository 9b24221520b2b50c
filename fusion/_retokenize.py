"""A checkpoint under another vocabulary: which rows are kept, which are made, and the files around them.

Only tensors with a row a token change; all others are copied byte by byte. Files are mapped, because rows are gathered
from anywhere in a table, and written a chunk at a time; no model is built. What a killed run had written stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusion._files import Header, header

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from alignment.rows import Mix
    from fusion.checkpoint import Shard

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "shared",
    "embed_tokens_per_layer",
)
HEADS = ("lm_head", "embed_out", "output")
POSITIONS = ("wpe", "embed_positions", "position_embeddings")
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 1 << 24  # bytes written at once


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors, mapped into memory: what is not looked at is not read."""

    directory: Path
    header: Header
    tables: dict[str, str]  # tensors with a row a token -> "in" (embeddings) or "out" (the head and its bias)

    @classmethod
    def open(cls, directory: Path) -> Stored:
        """The checkpoint; ValueError where its tensors are not understood."""
        found = header(directory)
        return cls(directory, found, token_tables(found, str(directory)))

    @property
    def rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.header.shapes[next(iter(self.tables))][0]

    def bytes(self, name: str) -> np.ndarray:
        """The tensor's bytes (n,) uint8 as they lie in the file."""
        import numpy as np

        entry = self.header.tensors[name]
        if not entry.bytes:
            return np.zeros(0, np.uint8)
        # "c": torch wants it writable
        return np.memmap(self.directory / entry.file, np.uint8, "c", entry.start, (entry.bytes,))

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped."""
        import torch

        from fusion.checkpoint import DTYPES

        entry = self.header.tensors[name]
        if entry.dtype not in FLOATS:
            raise ValueError(f"{self.directory}: {name} is stored as {entry.dtype}; dequantise it first")
        return torch.frombuffer(self.bytes(name), dtype=DTYPES[entry.dtype]).view(entry.shape)

    def table(self, way: str) -> Tensor:
        """The embedding ("in") or the head ("out"; the embedding where they are tied), mapped."""
        matrices = {kind: name for name, kind in reversed(self.tables.items()) if len(self.header.shapes[name]) == 2}
        return self.tensor(matrices.get(way, matrices["in"]))


def token_tables(found: Header, place: str) -> dict[str, str]:
    """The tensors with a row a token, embeddings first; ValueError for a model whose tensors are not understood."""
    outside = {name: found.tensors[name].shape for name in sorted(found.tensors) if not _numbered(name)}
    kinds: dict[str, str] = {}
    for name in outside:
        part = _owner(name)
        if part in EMBEDDINGS or part in HEADS:
            kinds[name] = "in" if part in EMBEDDINGS else "out"
    inputs = [name for name, kind in kinds.items() if kind == "in"]
    if not inputs:
        raise ValueError(f"{place} has no token embedding: no tensor is called one of {', '.join(EMBEDDINGS)}")
    rows = outside[inputs[0]][0]
    width = outside[inputs[0]][-1]
    for name in kinds:
        if outside[name][0] != rows:
            raise ValueError(f"{place}: {inputs[0]} has {rows} rows, {name} has {outside[name][0]}; they must agree")
    unknown = [
        n for n, s in outside.items() if rows in s and rows != width and n not in kinds and _owner(n) not in POSITIONS
    ]
    if unknown:
        raise ValueError(
            f"{place}: {unknown[0]} {list(outside[unknown[0]])} is as long as the vocabulary ({rows}) but neither an "
            f"embedding ({', '.join(EMBEDDINGS)}) nor a head ({', '.join(HEADS)}); it can't be given other tokens"
        )
    # a head that is stored beside an embedding it is tied to goes through the same as that
    return {name: "in" if found.tied else kinds[name] for name in [*inputs, *(n for n in kinds if n not in inputs)]}


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _owner(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Rows:
    """Where the rows of the new vocabulary come from: a row of the model's own, a mix of them, or the mean."""

    kept: np.ndarray  # (V,) int64: the model's own row, -1 for none
    mixed: dict[str, tuple[np.ndarray, Mix]]  # "in", "out" -> ids (M,) ascending, and their mixes
    used: np.ndarray  # the model's own ids that its tokenizer names: what a mean is over
    zero: np.ndarray  # ids that get zeros; all that is in none of these, padding included, gets the mean


def rewritten(table: Tensor, rows: Rows, way: str, count: int) -> Iterator[Tensor]:
    """The table's new rows (count, ...) in its own dtype, in chunks."""
    import numpy as np
    import torch

    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    for part in np.array_split(rows.used, -(-len(rows.used) // 4096)):
        total += table[torch.from_numpy(part)].double().sum(0)
    average = (total / len(rows.used)).to(table.dtype)
    kept = torch.full((count,), -1, dtype=torch.int64)
    kept[: len(rows.kept)] = torch.from_numpy(rows.kept)
    ids, mix = rows.mixed.get(way, (np.zeros(0, np.int64), None))
    step = max(1, CHUNK // max(1, table[0].numel() * table.element_size()))
    for start in range(0, count, step):
        own = kept[start : start + step]
        chunk = torch.where((own >= 0).view(-1, *[1] * (table.dim() - 1)), table[own.clamp(min=0)], average)
        chunk[torch.from_numpy(rows.zero[(rows.zero >= start) & (rows.zero < start + step)] - start)] = 0
        first, last = np.searchsorted(ids, [start, start + step])
        if mix is not None and last > first:
            made = type(mix)(mix.ids[first:last], mix.weights[first:last]).rows(table)
            chunk[torch.from_numpy(ids[first:last] - start)] = made.to(table.dtype)
        yield chunk


def write(
    model: Stored,
    new: Mapping[str, Iterator[Tensor]],
    count: int,
    folder: Path,
    shard_size: str,
    advance: Callable[[int], None],
) -> None:
    """The checkpoint's files with the tables of `new` at `count` rows and every other tensor as it is; those that a
    killed run wrote into the folder stay. `advance(1)` hears of every tensor."""
    import torch

    from fusion._manifest import Manifest
    from fusion._partial import left_over
    from fusion._say import bytes_of
    from fusion.checkpoint import DTYPES, Entry, Writer, layout

    entries = []
    for name, entry in model.header.tensors.items():
        shape = (count, *entry.shape[1:]) if name in new else entry.shape
        entries.append(Entry(name, shape, DTYPES[entry.dtype], DTYPES[entry.dtype]))
    sizes = {entry.name: entry.numel * entry.dtype.itemsize for entry in entries}
    shards = layout(entries, bytes_of(shard_size, "shard_size"))
    if not _begun(folder, shards):
        for old in left_over(folder):
            old.unlink()
        Writer.create(folder, shards)
    writer, manifest = Writer(folder, shards), Manifest(folder)
    for name in [name for shard in shards for name in shard.places]:
        size = sizes[name]
        if not manifest.has(name) or manifest.checksum(name) != writer.checksum(name, 0, size):
            place = 0
            for chunk in new[name] if name in new else [torch.from_numpy(model.bytes(name))]:
                writer.write(name, place, chunk.flatten())
                place += chunk.numel()
            manifest.add(name, writer.checksum(name, 0, size), "made" if name in new else "copied", {})
        advance(1)
    writer.sync()
    writer.close()
    manifest.close()
    for old in left_over(folder):
        old.unlink()
    if len(shards) > 1:
        total = sum(sizes.values())
        where = {name: shard.file for shard in shards for name in shard.places}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _begun(folder: Path, shards: Sequence[Shard]) -> bool:
    """Whether an earlier run made these very files."""
    for shard in shards:
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.size:
            return False
        with open(file, "rb") as stream:
            if stream.read(len(shard.header)) != shard.header:
                return False
    return True
