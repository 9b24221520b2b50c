"""Texts as the recipe names them: `data:` entries become documents, and documents become tokens with byte ends."""

import functools
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion._cut import cut, parse_split, shuffled

if TYPE_CHECKING:
    import numpy as np

    from fusion.recipe import DataRef

STDLIB = "stdlib:"
ALL = "*"  # the column that stands for all of them: rows of preferences, see fusion/_rows.py
MAX_BYTES = 2048  # pieces a plain text is cut into when the recipe does not say
SUFFIXES = {"text": "", "json": "**/*.json*", "parquet": "**/*.parquet"}
Load = Callable[[int], "str | tuple[dict[str, str], ...]"]


@dataclass(frozen=True)
class Document:
    """One text, or one conversation (`messages`, with `text` empty), and the 32 hex digits that name its content."""

    text: str
    digest: str
    messages: tuple[dict[str, str], ...] | None = None

    @classmethod
    def of(cls, content: "str | Sequence[Mapping[str, str]]") -> "Document":
        if isinstance(content, str):
            return cls(content, _blake(content.encode()))
        messages = tuple({"role": m["role"], "content": m["content"]} for m in content)
        return cls("", _blake(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()), messages)

    @property
    def size(self) -> int:
        """Bytes of UTF-8 that count in bits per byte: the text, or the contents of all messages."""
        return len((self.text if self.messages is None else "".join(m["content"] for m in self.messages)).encode())


@dataclass(frozen=True)
class Encoded:
    """A document in one model's tokens: ids (T,), ends (T,) in bytes, is_content (T,), false for special tokens."""

    ids: "np.ndarray"
    ends: "np.ndarray"
    is_content: "np.ndarray"


def _blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------- files and digests


def files(ref: "DataRef", base: Path) -> list[Path]:
    """The files a `path:` names, sorted; ValueError when there is none."""
    assert ref.path is not None
    if ref.path == STDLIB:
        return list(_stdlib())
    path = base / Path(ref.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.glob(SUFFIXES.get(ref.format or "text", "") or "**/*") if p.is_file())
    else:
        found = sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(f"{ref.place}.path: no file at {path}")
    return found


@functools.cache
def _stdlib() -> tuple[Path, ...]:
    """The standard library's sources; folders that are not its own (installed packages, tests) are not walked."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return tuple(sorted(found))


def digest(ref: "DataRef", base: Path, hash_file: Callable[[Path], str], lookup: Mapping[str, "DataRef"]) -> str:
    """The content key of a data set: its fields and the bytes of its files (`hash_file` may cache)."""
    fields: dict[str, Any] = {
        "format": ref.format,
        "split": ref.split,
        "column": ref.column,
        "shuffle": ref.shuffle,
        "max_bytes": ref.max_bytes,
    }
    if ref.mix:
        fields["mix"] = [[digest(lookup[name], base, hash_file, lookup), weight] for name, weight in ref.mix.items()]
    elif ref.path is not None:
        fields["files"] = [hash_file(path) for path in files(ref, base)]
        if ref.path == STDLIB:
            fields["python"] = sys.version.split()[0]
    else:
        fields["hub"] = [ref.hub, ref.revision]
    return _blake(json.dumps(fields, sort_keys=True).encode())


# ---------------------------------------------------------------------------------------------- documents


class Documents(Sequence[Document]):
    """Pieces (row, start, end) of rows that are read when they are asked for; start and end count characters."""

    def __init__(self, load: Load, pieces: "np.ndarray"):
        self._load, self._pieces = load, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Documents(self._load, self._pieces[index])
        row, start, end = (int(v) for v in self._pieces[index])
        content = self._load(row)
        return Document.of(content[start:end] if isinstance(content, str) and end >= 0 else content)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


class Mixed(Sequence[Document]):
    """Several data sets in the proportions asked for, counted in documents, until the first one is used up."""

    def __init__(self, parts: Sequence[Sequence[Document]], weights: Sequence[float]):
        total = sum(weights)
        taken = [0] * len(parts)
        order: list[tuple[int, int]] = []
        while True:
            # the part that lags most behind its share comes next: exact proportions at every prefix, no random numbers
            lag = [w / total * (len(order) + 1) - t for w, t in zip(weights, taken, strict=True)]
            part = lag.index(max(lag))
            if taken[part] == len(parts[part]):
                break
            order.append((part, taken[part]))
            taken[part] += 1
        self._parts, self._order = parts, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        part, row = self._order[index]
        return self._parts[part][row]

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


def documents(ref: "DataRef", base: Path, lookup: Mapping[str, "DataRef"]) -> Sequence[Document]:
    """The documents of a `data:` entry, in a fixed order; ValueError for a missing file or column, or no text."""
    if ref.mix:
        found: Sequence[Document] = Mixed([documents(lookup[n], base, lookup) for n in ref.mix], list(ref.mix.values()))
    elif ref.format == "text" and ref.path is not None:
        found = _from_text(ref, base)
    else:
        found = _from_table(ref, base)
    if not len(found) or not any(document.size for document in found):
        raise ValueError(f"{ref.place}: no text in it (split {ref.split!r} of {ref.path or ref.hub or ref.mix})")
    return found


def _from_text(ref: "DataRef", base: Path) -> Documents:
    import numpy as np

    paths = files(ref, base)

    @lru_cache(maxsize=32)  # files: neighbours mostly come from one of the last ones
    def load(row: int) -> str:
        try:
            return paths[row].read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{ref.place}: {paths[row]} is not UTF-8 at byte {error.start}; convert it first"
            ) from None

    pieces = [(row, a, b) for row in range(len(paths)) for a, b in cut(load(row), ref.max_bytes or MAX_BYTES)]
    table = np.asarray(pieces, dtype=np.int64).reshape(-1, 3)
    return Documents(load, shuffled(table, ref.shuffle)[parse_split(ref.split, len(table), ref.place)])


def columns_of(ref: "DataRef", base: Path) -> tuple[Any, str | None]:
    """All columns of a json, parquet or hub entry, and the split still to be taken of it (None: it is taken)."""
    import datasets

    datasets.disable_progress_bars()
    whole, sliced = (ref.split, None) if ref.shuffle is None else (ref.split.partition("[")[0], ref.split)
    if ref.hub is not None:
        return datasets.load_dataset(ref.hub, revision=ref.revision, split=whole), sliced
    return datasets.load_dataset(ref.format, data_files=[str(p) for p in files(ref, base)], split=whole), sliced


def _from_table(ref: "DataRef", base: Path) -> Documents:
    import numpy as np

    if ref.column == ALL:
        raise ValueError(
            f"{ref.place}: it has rows of preferences (column: '*'), and texts are needed here; name their column"
        )
    rows, sliced = columns_of(ref, base)
    if ref.column not in rows.column_names:
        raise ValueError(f"{ref.place}.column: no column {ref.column!r}; there is {', '.join(rows.column_names)}")
    column = rows.select_columns(ref.column)

    def load(row: int) -> "str | tuple[dict[str, str], ...]":
        value = column[row][ref.column]
        if isinstance(value, str):
            return value
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        ):
            return tuple(value)
        raise ValueError(f"{ref.place}: row {row} of {ref.column!r} is neither a text nor a list of role and content")

    pieces: list[tuple[int, int, int]] = []
    for row in range(len(column)):
        content = load(row) if ref.max_bytes else None
        if ref.max_bytes and isinstance(content, str):
            pieces += [(row, a, b) for a, b in cut(content, ref.max_bytes)]
        else:
            pieces.append((row, -1, -1))
    table = shuffled(np.asarray(pieces, dtype=np.int64).reshape(-1, 3), ref.shuffle)
    return Documents(load, table[parse_split(sliced, len(table), ref.place)])


# ---------------------------------------------------------------------------------------------- tokens


def start_id(tokenizer: Any) -> int | None:
    """The token a text begins with: what the tokenizer itself puts there, else its BOS, else its EOS, else none.

    With it the first token of a text has a prediction too; record, training and evaluation all use this one.
    """
    own = tokenizer("", add_special_tokens=True)["input_ids"]
    if own and own[0] != tokenizer.eos_token_id:
        return own[0]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode(tokenizer: Any, document: Document) -> Encoded:
    """A document as start token, text and end token (the tokenizer's EOS, or SEP, if it has one).

    Messages go through the model's own template, of which only contents are text. Special tokens are zero-length: they
    end where the token before them ends.
    """
    import numpy as np

    from alignment.tokens import chat_spans, spans

    if document.messages is not None:
        return Encoded(*chat_spans(tokenizer, list(document.messages)))
    ids, ends = spans(tokenizer, document.text)
    first = start_id(tokenizer)
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    head, tail = [] if first is None else [first], [] if last is None else [last]
    end = int(ends[-1]) if len(ends) else 0
    return Encoded(
        np.concatenate([np.asarray(head, np.int64), ids, np.asarray(tail, np.int64)]),
        np.concatenate([np.zeros(len(head), np.int64), ends, np.full(len(tail), end, np.int64)]),
        np.concatenate([np.zeros(len(head), bool), np.ones(len(ids), bool), np.zeros(len(tail), bool)]),
    )
