"""Documents as rows of tokens to train on: encoded once by rank 0 into memory-mapped files, packed, batched."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusion._causal import Piece, batch, one_per_row, pack
from fusion.data import Document, encode

if TYPE_CHECKING:
    from fusion.join import Join

IGNORED = -100  # the label Hugging Face losses skip


def encode_to_disk(directory: Path, tokenizer: Any, documents: Iterable[Document]) -> None:
    """Writes ids.bin, ends.bin (int32), learnt.bin (bool), offsets.npy (D+1,) and, last, digests.json."""
    directory.mkdir(parents=True, exist_ok=True)
    offsets, digests = [0], []
    streams = {name: open(directory / f"{name}.part", "wb") for name in ("ids", "ends", "learnt")}
    for document in documents:
        encoded = encode(tokenizer, document)
        # in a text every token is learnt, the end token too; in a conversation only what stands inside the messages
        learnt = encoded.is_content if document.messages is not None else np.ones(len(encoded.ids), bool)
        streams["ids"].write(encoded.ids.astype(np.int32).tobytes())
        streams["ends"].write(encoded.ends.astype(np.int32).tobytes())
        streams["learnt"].write(learnt.tobytes())
        offsets.append(offsets[-1] + len(encoded.ids))
        digests.append(document.digest)
    for name, stream in streams.items():
        stream.close()
        (directory / f"{name}.part").replace(directory / f"{name}.bin")
    np.save(directory / "offsets.npy", np.asarray(offsets, np.int64))
    (directory / "digests.part").write_text(json.dumps(digests))
    (directory / "digests.part").replace(directory / "digests.json")


class Windows(torch.utils.data.Dataset):
    """Rows of pieces of documents, each row at most `max_length` tokens; what is longer goes on in the next row."""

    def __init__(self, directory: Path, max_length: int, packed: bool):
        self.directory = directory
        self.offsets = np.load(directory / "offsets.npy")
        self.digests: list[str] = json.loads((directory / "digests.json").read_text())
        self.rows = (pack if packed else one_per_row)(np.diff(self.offsets).tolist(), max_length)

    def _column(self, name: str, dtype: Any, document: int) -> np.ndarray:
        column = np.memmap(self.directory / f"{name}.bin", dtype=dtype, mode="r")
        return np.array(column[self.offsets[document] : self.offsets[document + 1]])

    def ids(self, document: int) -> np.ndarray:  # (T,)
        return self._column("ids", np.int32, document).astype(np.int64)

    def ends(self, document: int) -> np.ndarray:  # (T,) bytes
        return self._column("ends", np.int32, document).astype(np.int64)

    def learnt(self, document: int) -> np.ndarray:  # (T,) bool
        return self._column("learnt", np.bool_, document)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Piece]:
        return self.rows[index]


@dataclass(frozen=True)
class Collator:
    """Rows -> input_ids, labels (B, T), position_ids where a row holds several documents, and the join's targets."""

    windows: Windows
    fill: int
    join: "Join | None" = None

    def __call__(self, rows: Sequence[list[Piece]]) -> dict[str, torch.Tensor]:
        documents = {piece.document: self.windows.ids(piece.document) for row in rows for piece in row}
        made = batch(rows, documents, pad=self.fill)
        inputs = {name: value for name, value in made.inputs.items() if isinstance(value, torch.Tensor)}
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for piece, row, column in made.places:
            # nothing precedes the first token of a piece in its row: another document would predict it
            here = slice(piece.start + 1, piece.stop)
            learnt = np.where(self.windows.learnt(piece.document)[here], documents[piece.document][here], IGNORED)
            labels[row, column + 1 : column + 1 + len(learnt)] = torch.from_numpy(learnt)
        inputs["labels"] = labels
        return inputs if self.join is None else inputs | self.join.batch(self.windows, made.places, labels.shape[1])


def windows(
    directory: Path,
    tokenizer: Any,
    documents: Callable[[], Iterable[Document]],
    max_length: int,
    packed: bool,
    rank: int,
    wait: Callable[[Callable[[], bool], str], None],
) -> Windows:
    """The training rows of a data set, encoded by rank 0, read by all; `wait(ready, what)` returns once `ready()`."""
    if rank == 0 and not (directory / "digests.json").exists():
        encode_to_disk(directory, tokenizer, documents())
    wait((directory / "digests.json").exists, "the tokens of the training data")
    found = Windows(directory, max_length, packed)
    if not found.rows:
        raise ValueError("the training data have no token")
    return found
