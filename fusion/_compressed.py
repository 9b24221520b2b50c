"""Compressed task vectors: two files that, on top of the base, are a model again.

`compression.json`: {"format": 1, "method": "one_bit" | "compeft", "params": {...}, "base": CHECK}, where CHECK is the
CRC-32 of the base's first 4096 entries of every tensor in the list, in the order of their names.
`compression.safetensors` has, for each tensor NAME that differs from the base's, with n entries:
    NAME/scale   F32 ()             how far its entries move
    NAME/signs   U8 (ceil(m / 8))   bit i of the file's bit string, lowest bit first, is 1 for up and 0 for down
    NAME/kept    U8 (ceil(n / 8))   compeft only: 1 where an entry moves; `signs` then has one bit for each of those
    NAME/before  I64 (ceil(n / P))  compeft only: how many entries move before each page of P = 65,536 entries
so one_bit takes 1 bit an entry (m = n) and compeft 1 + density bits and 0.001 (m = number kept), where the model
itself takes 16 or 32. config.json and the tokenizer's files are copied beside them.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion._carry import carry
from fusion._method import Method, Region
from fusion._params import depths, layer_of
from fusion._say import nearest
from fusion._trial import trial
from fusion.checkpoint import Checkpoint, Entry, Source, Writer, layout, region
from fusion.merge._x import Running
from fusion.merge.compeft import ternary
from fusion.merge.one_bit import magnitudes

SETTINGS, FILE = "compression.json", "compression.safetensors"
WORDS = ("one_bit", "compeft")
PAGE = 1 << 16
CHUNK = 1 << 20  # entries in memory at one time, whole pages
FIRST = 4096


@dataclass(frozen=True)
class Compressed:
    """A base with a compressed task vector on it, read by region in float32."""

    path: Path
    base: Source
    bits: Checkpoint
    entries: dict[str, Entry]

    @property
    def config(self) -> dict[str, Any]:
        return self.bits.config or self.base.config

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, *self.bits.files, self.path / SETTINGS)

    def read(self, name: str, start: int, stop: int, into: Tensor) -> None:
        """Entries [start, stop) of the flattened tensor into a 1-D buffer; those that did not change are the base's."""
        if f"{name}/scale" not in self.bits.entries:
            self.base.read(name, start, stop, into)
            return
        below = region(self.base, name, start, stop)
        scale = float(region(self.bits, f"{name}/scale", 0, 1))
        into.copy_(below).add_(self._signs(name, start, stop), alpha=scale)

    def _signs(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) float32 of -1, 0 and +1."""
        if f"{name}/kept" not in self.bits.entries:
            return _bits(self.bits, f"{name}/signs", start, stop).float().mul_(2).sub_(1)
        page = start // PAGE
        first = page * PAGE
        kept = _bits(self.bits, f"{name}/kept", first, stop)
        begin = int(region(self.bits, f"{name}/before", page, page + 1)) + int(kept[: start - first].sum())
        kept = kept[start - first :].bool()
        signs = _bits(self.bits, f"{name}/signs", begin, begin + int(kept.sum()))
        out = torch.zeros(stop - start)
        out[kept] = signs.float().mul_(2).sub_(1)
        return out


def open_compressed(directory: Path | str, base: Source | None) -> Compressed:
    """The model that the directory's compressed task vector is on `base`.

    Raises ValueError without a base, on another base than it was made from, and for a format that is not known.
    """
    directory = Path(directory)
    settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    if base is None:
        raise ValueError(f"{directory} is a compressed task vector, which is a model only on top of its base; give it")
    if settings["format"] != 1 or settings["method"] not in WORDS:
        raise ValueError(f"{directory / SETTINGS}: format {settings['format']} of {settings['method']} is not known")
    bits = Checkpoint.open(directory)
    names = sorted(name.removesuffix("/scale") for name in bits.entries if name.endswith("/scale"))
    check = _check(base, names)
    if check != settings["base"]:
        raise ValueError(
            f"{directory} was made from another base than {base.path}: the check of {len(names)} tensors is {check} "
            f"and has to be {settings['base']}"
        )
    changed = set(names)
    entries = {
        name: replace(entry, dtype=torch.float32) if name in changed else entry for name, entry in base.entries.items()
    }
    return Compressed(directory, base, bits, entries)


def check(word: Method, given: Mapping[str, Any], model: Source, base: Source) -> None:
    """Raises what `compress` would, from headers and for the values of parameters."""
    stacks, tried = depths(model.entries), set()
    _go_together(model, base)
    for name in base.entries:
        params = word.resolve(given, name, layer_of(name, stacks))
        if repr(params) not in tried:
            tried.add(repr(params))
            trial(word, params, torch.ones(1), True)


def compress(
    method: str, model: Source, base: Source, out: Path | str, params: Mapping[str, Any] | None = None
) -> Compressed:
    """Writes what is left of model - base by one_bit or compeft into the new directory `out`, and opens it.

    Raises ValueError for another method or a parameter that it does not have, for tensors that the base does not have
    or has in another shape, and when `out` exists.
    """
    out = Path(out)
    if method not in WORDS:
        raise ValueError(f"'{method}' does not compress{nearest(method, WORDS)}")
    if out.exists():
        raise ValueError(f"{out} exists; compressed task vectors go into a new directory")
    word, params = Method.of(method), dict(params or {})
    given = word.check(params, 1)
    if word.scope(given) == "model":
        raise ValueError(f"{method}: scope is model, and task vectors are compressed tensor by tensor")
    changed, stacks = _changed(model, base), depths(model.entries)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pieces = {
        name: _plan(word, word.resolve(given, name, layer_of(name, stacks)), model, base, name) for name in changed
    }
    for name, piece in pieces.items():
        if not math.isfinite(piece.scale):
            raise ValueError(f"{name} of {model.path} has NaN or infinity in it; compressed, all of it would be")
    entries = [entry for name in changed for entry in _entries(name, base.entries[name].numel, pieces[name])]
    shards = tuple(replace(shard, file=FILE) for shard in layout(entries, 1 << 62))
    Writer.create(partial, shards)
    writer = Writer(partial, shards)
    for name in changed:
        _write(writer, model, base, name, pieces[name])
    writer.sync()
    writer.close()
    settings = {"format": 1, "method": method, "params": params, "base": _check(base, sorted(changed))}
    (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    carry(partial, model.config, (), model, model)
    partial.rename(out)
    return open_compressed(out, base)


@dataclass(frozen=True)
class _Piece:
    """What is stored of one tensor: how far entries move, and for compeft which do and how many before each page."""

    scale: float
    least: float | None = None
    before: tuple[int, ...] = ()
    kept: int = 0


def _changed(model: Source, base: Source) -> list[str]:
    """Names of tensors whose numbers are not the base's."""
    changed = []
    _go_together(model, base)
    for name, entry in model.entries.items():
        same = all(bool((tensors[0] == below).all()) for _, tensors, below in _chunks(model, base, name))
        if same:
            continue
        if not entry.stored.is_floating_point:
            raise ValueError(f"'{name}' holds whole numbers ({entry.stored}) that differ from the base's")
        changed.append(name)
    return changed


def _go_together(model: Source, base: Source) -> None:
    """ValueError, from headers, for a tensor that only one of them has, or that they have in two shapes."""
    if missing := sorted(base.entries.keys() - model.entries.keys()):
        raise ValueError(
            f"{model.path} has no tensor '{missing[0]}', which {base.path} has ({len(missing)} are missing)"
        )
    for name, entry in model.entries.items():
        if name not in base.entries:
            raise ValueError(f"{base.path} has no tensor '{name}', which {model.path} has{nearest(name, base.entries)}")
        if entry.shape != base.entries[name].shape:
            raise ValueError(f"'{name}' is {entry.shape} in {model.path} and {base.entries[name].shape} in {base.path}")


def _chunks(model: Source, base: Source, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(start, (1, n) of the model, (n,) of the base), float32, one after another."""
    numel = model.entries[name].numel
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        yield start, region(model, name, start, stop).float().unsqueeze(0), region(base, name, start, stop).float()


def _plan(word: Method, params: Mapping[str, Any], model: Source, base: Source, name: str) -> _Piece:
    """By the method's own statistics, so that the model read back is what the method makes of one model."""
    stats: Mapping[str, Tensor] = {}
    for index in range(len(word.passes)):
        running = Running()
        for number, (start, tensors, below) in enumerate(_chunks(model, base, name)):
            shape = model.entries[name].shape
            region = Region(tensors, below, torch.ones(1), name, shape, start=start, stats=stats)
            running.add(number, word.call_pass(index, region, params))
        stats = word.settle({**stats, **running.values()}, params)
    if word.word == "one_bit":
        return _Piece(params["scale"] * float(magnitudes(stats)))
    least, before = float(stats["threshold"]), [0]
    for _, tensors, below in _chunks(model, base, name):
        for page in ternary(tensors[0] - below, least).split(PAGE):
            before.append(before[-1] + int(torch.count_nonzero(page)))
    alpha = params["alpha"] if isinstance(params["alpha"], int | float) else params["alpha"][0]
    return _Piece(params["scale"] * alpha * float(stats["deviation"]), least, tuple(before[:-1]), before[-1])


def _entries(name: str, n: int, piece: _Piece) -> list[Entry]:
    def entry(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
        return Entry(f"{name}/{what}", shape, dtype, dtype)

    scale = entry("scale", (), torch.float32)
    if piece.least is None:
        return [scale, entry("signs", (-(-n // 8),), torch.uint8)]
    return [
        scale,
        entry("signs", (-(-piece.kept // 8),), torch.uint8),
        entry("kept", (-(-n // 8),), torch.uint8),
        entry("before", (len(piece.before),), torch.int64),
    ]


def _write(writer: Writer, model: Source, base: Source, name: str, piece: _Piece) -> None:
    writer.write(f"{name}/scale", 0, torch.tensor([piece.scale]))
    if piece.least is None:
        for start, tensors, below in _chunks(model, base, name):
            writer.write(f"{name}/signs", start // 8, _packed(tensors[0] > below))
        return
    writer.write(f"{name}/before", 0, torch.tensor(piece.before))
    rest, done = torch.empty(0, dtype=torch.bool), 0  # signs wait until they fill a byte
    for start, tensors, below in _chunks(model, base, name):
        signs = ternary(tensors[0] - below, piece.least)
        writer.write(f"{name}/kept", start // 8, _packed(signs != 0))
        rest = torch.cat([rest, signs[signs != 0] > 0])
        full = len(rest) // 8 * 8
        if full:
            writer.write(f"{name}/signs", done, _packed(rest[:full]))
        rest, done = rest[full:], done + full // 8
    if len(rest):
        writer.write(f"{name}/signs", done, _packed(rest))


def _packed(bits: Tensor) -> Tensor:  # (n,) bool
    """(ceil(n / 8),) uint8, lowest bit first."""
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def _bits(source: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """(stop - start,) uint8 bits [start, stop) of a packed tensor."""
    first = start // 8
    packed = region(source, name, first, max(first, -(-stop // 8)))
    return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")[start - first * 8 : stop - first * 8])


def _check(base: Source, names: list[str]) -> str:
    """8 hex digits of the base's first entries; names that it lacks leave another number."""
    crc = 0
    for name in names:
        if name in base.entries:
            head = region(base, name, 0, min(FIRST, base.entries[name].numel))
            crc = zlib.crc32(head.view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
