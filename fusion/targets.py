"""The store of what a teacher said: one directory per teacher and text, by document, in the teacher's vocabulary.

    store.json           header, manifest of shards, totals; written last, so that a store without it is unfinished
    NNNNN.safetensors    64 documents, each a uint8 tensor named by the document's digest (_pack.py has the layout)
    NNNNN.json           the shard's sidecar: its sha256, digests and counts
    tokenizer/           a copy of the teacher's tokenizer: a student needs nothing else of the teacher

A shard depends on its documents and the settings alone, so ranks, kills and resumes change no byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion._pack import FORMAT, DocumentTargets, pack, unpack
from fusion._select import Entries, Rule, select, uniforms

__all__ = ["DocumentTargets", "Entries", "Header", "Rule", "Store", "Writer", "select", "text_digest", "uniforms"]

SHARD = 64  # documents
OPEN_SHARDS = 32  # that a Store keeps mapped
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Header:
    """What a store holds. The totals are filled in by `Writer.finish`."""

    teacher: str  # its name in the recipe
    model: str  # digest of the teacher's weights
    tokenizer: str  # digest of its tokenizer
    rule: Rule
    dtype: str  # the teacher ran in
    vocabulary: int  # width of its head
    max_length: int  # tokens of a window; longer documents are recorded in consecutive windows
    batch_tokens: int
    seed: int
    version: int = FORMAT
    text: str = ""  # `text_digest` of all documents
    documents: int = 0
    tokens: int = 0
    rows: int = 0  # tokens that were predicted
    entries: int = 0
    bytes: int = 0  # of shards and sidecars
    nats: float = 0.0  # of all tokens that are text
    text_bytes: int = 0  # of these tokens

    @property
    def kind(self) -> str:
        return self.rule.kind(self.vocabulary)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """The teacher's own, over the recorded text."""
        return self.nats / np.log(2) / max(self.text_bytes, 1)


TOTALS = ("documents", "tokens", "rows", "entries", "bytes", "nats", "text_bytes")


def text_digest(digests: Iterable[str]) -> str:
    """One digest for a set of documents, whatever their order."""
    return hashlib.blake2b("".join(sorted(set(digests))).encode(), digest_size=16).hexdigest()


class Writer:
    """Writes the shards of a store; any number of processes may write different shards of one directory."""

    def __init__(self, directory: Path, header: Header):
        self.directory, self.header = directory, header
        directory.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(
            {name: value for name, value in asdict(header).items() if name not in ("text", *TOTALS)}, sort_keys=True
        )
        self.key = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()

    def complete(self, shard: int, digests: Sequence[str]) -> bool:
        """Whether the shard of these documents stands whole, made with the same settings; its checksum is taken."""
        sidecar = self.sidecar(shard)
        if sidecar is None or sidecar["key"] != self.key or sidecar["digests"] != list(dict.fromkeys(digests)):
            return False
        file = self.directory / sidecar["file"]
        return file.exists() and _sha256(file) == sidecar["sha256"]

    def write(self, shard: int, documents: Mapping[str, tuple[DocumentTargets, np.ndarray]]) -> None:
        """The shard, then its sidecar, each written beside its place, flushed to the disk and renamed.

        Documents come by their digests, each with a flag (T,) for the tokens that are text and count in bits per byte.
        """
        from safetensors.numpy import save

        header = self.header
        packed = {
            key: pack(said, header.kind, header.rule.draws, header.vocabulary) for key, (said, _) in documents.items()
        }
        content, name = save(packed), f"{shard:05d}.safetensors"
        counts = [_counts(said, is_text) for said, is_text in documents.values()]
        sidecar = {
            "key": self.key,
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "digests": list(documents),
            **{field: sum(count[field] for count in counts) for field in TOTALS if field != "bytes"},
        }
        _write(self.directory / name, content)
        _write(self.directory / f"{shard:05d}.json", json.dumps(sidecar).encode())

    def has(self, shard: int) -> bool:
        """Whether somebody wrote that shard with these settings."""
        sidecar = self.sidecar(shard)
        return sidecar is not None and sidecar["key"] == self.key

    def sidecar(self, shard: int) -> dict[str, Any] | None:
        """What is known of a shard; None while it is not there."""
        file = self.directory / f"{shard:05d}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, shards: int, tokenizer: Path) -> Header:
        """Copies the tokenizer from its directory and writes store.json; every sidecar must be there."""
        manifest, digests, totals = [], [], dict.fromkeys(TOTALS, 0)
        for shard in range(shards):
            sidecar = self.sidecar(shard)
            assert sidecar is not None and sidecar["key"] == self.key, f"shard {shard} is not written"
            size = sidecar["size"] + (self.directory / f"{shard:05d}.json").stat().st_size
            for field in TOTALS:
                totals[field] += size if field == "bytes" else sidecar[field]
            digests += sidecar["digests"]
            manifest.append({name: sidecar[name] for name in ("file", "sha256", "size", "documents", "tokens")})
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                (self.directory / "tokenizer").mkdir(exist_ok=True)
                _write(self.directory / "tokenizer" / name, (tokenizer / name).read_bytes())
        for left in self.directory.glob("*.part"):
            left.unlink()
        header = Header(**(asdict(self.header) | totals | {"rule": self.header.rule, "text": text_digest(digests)}))
        store = {"header": asdict(header), "shards": manifest}
        _write(self.directory / "store.json", json.dumps(store, indent=1).encode())
        return header


class Store:
    """A finished store, read by document digest; may be pickled and handed to worker processes."""

    def __init__(self, path: Path, header: Header, shards: Sequence[Mapping[str, Any]]):
        self.path, self.header = path, header
        self._shards = {shard["file"]: shard for shard in shards}
        self._index: dict[str, str] | None = None
        self._open: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    def open(
        cls, path: Path | str, model: str | None = None, tokenizer: str | None = None, text: str | None = None
    ) -> Store:
        """The store at `path`; ValueError when it is unfinished, of another version, lacks a shard, or has other
        digests than those asked for. A shard's checksum is taken when it is first read (`verify` takes all)."""
        directory = Path(path)
        file = directory / "store.json"
        if not file.exists():
            raise ValueError(f"{directory} is no finished store of targets: it has no store.json")
        content = json.loads(file.read_text())
        version = content["header"]["version"]
        if version != FORMAT:
            raise ValueError(
                f"{directory} is a store of version {version}, this fusion reads {FORMAT}: record it again"
            )
        header = Header(**(content["header"] | {"rule": Rule(**content["header"]["rule"])}))
        asked = {"model": model, "tokenizer": tokenizer, "text": text}
        for name, digest in asked.items():
            held = {"model": header.model, "tokenizer": header.tokenizer, "text": header.text}[name]
            if digest is not None and digest != held:
                raise ValueError(
                    f"{directory} was recorded from another {name} (digest {held}, asked for {digest}): record it again"
                )
        for shard in content["shards"]:
            place = directory / shard["file"]
            size = place.stat().st_size if place.exists() else -1
            if size != shard["size"]:
                state = "missing" if size < 0 else f"{size} bytes long instead of {shard['size']}"
                raise ValueError(f"{place} is {state}: the store is damaged; delete {directory} and record it again")
        return cls(directory, header, content["shards"])

    @property
    def kind(self) -> str:
        """sampled, truncated or whole."""
        return self.header.kind

    @property
    def tokenizer(self) -> Path:
        """The directory with the teacher's tokenizer."""
        return self.path / "tokenizer"

    def __contains__(self, digest: object) -> bool:
        return digest in self._places()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())

    def __getitem__(self, digest: str) -> DocumentTargets:
        places = self._places()
        if digest not in places:
            raise KeyError(f"{self.path} has no document {digest}")
        return unpack(self._shard(places[digest]).get_tensor(digest))

    def verify(self) -> None:
        """Raise ValueError naming the first shard whose checksum or documents are not those of the manifest."""
        for file in self._shards:
            self._shard(file)
        held = text_digest(self._places())
        if held != self.header.text:
            raise ValueError(
                f"{self.path}: its documents (digest {held}) are not those of store.json ({self.header.text})"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # a worker maps the files itself

    def _places(self) -> dict[str, str]:
        if self._index is None:
            self._index = {}
            for file in self._shards:
                sidecar = json.loads((self.path / file).with_suffix(".json").read_text())
                for digest in sidecar["digests"]:
                    self._index.setdefault(digest, file)
        return self._index

    def _shard(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            place = self.path / file
            if _sha256(place) != self._shards[file]["sha256"]:
                raise ValueError(
                    f"{place} is corrupt (its sha256 is not that of store.json): delete {self.path} and record it again"
                )
            self._open[file] = safe_open(place, framework="numpy")
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


def _counts(said: DocumentTargets, is_text: np.ndarray) -> dict[str, Any]:
    spans = np.diff(said.ends, prepend=0)
    scored = np.isfinite(said.nll) & is_text
    return {
        "documents": 1,
        "tokens": len(said.ids),
        "rows": int((np.diff(said.offsets) > 0).sum()),
        "entries": len(said.entry_ids),
        "nats": float(said.nll[scored].sum(dtype=np.float64)),
        "text_bytes": int(spans[scored].sum()),
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(place: Path, content: bytes) -> None:
    part = place.with_name(place.name + ".part")
    with open(part, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, place)
    folder = os.open(place.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
