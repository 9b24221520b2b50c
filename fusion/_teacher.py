"""A loaded teacher that turns documents into targets: packed forward passes, the head in chunks, never all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.targets import DocumentTargets, Header, Rule, select, uniforms

if TYPE_CHECKING:
    from fusion._causal import Batch, Piece
    from fusion.data import Document, Encoded

WINDOW = 1024  # tokens, when nothing is said
CHUNK = 1 << 23  # logits alive at once: 32 MiB in float32
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # how configurations call their longest input


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode and all that decides what it writes."""

    header: Header
    decoder: Any
    head: Callable[[Any], Any]
    tokenizer: Any
    packed: bool
    device: str
    salt: int  # seeds the draws

    def encode(self, document: Document) -> Encoded:
        from fusion.data import encode

        return encode(self.tokenizer, document)

    def targets(
        self, documents: Mapping[str, Document], advance: Callable[[int], None] = lambda count: None
    ) -> dict[str, tuple[DocumentTargets, np.ndarray]]:
        """By its digest each document's targets, and which of its tokens are text (T,) rather than template or special;
        `advance` hears how many documents were begun.

        Raises ValueError for NaN or infinite logits, naming document and row.
        """
        digests, shard = self._shard(documents)
        parts = []
        for batch in self._batches(shard):
            parts.append(self._batch(batch, shard, digests))
            advance(sum(piece.start == 0 for piece, _, _ in batch.places))
        advance(sum(len(text.ids) == 0 for text in shard.texts))
        found = zip(digests, shard.collect(parts), shard.texts)
        return {digest: (said, text.is_content) for digest, said, text in found}

    def batches(self, documents: Mapping[str, Document]) -> list[Batch]:
        """The forward passes that `targets` makes for these documents."""
        return list(self._batches(self._shard(documents)[1]))

    def _shard(self, documents: Mapping[str, Document]) -> tuple[list[str], _Shard]:
        encoded = {digest: self.encode(document) for digest, document in documents.items()}
        # The longest first: rows are as wide as the longest document, and the short ones fill their gaps.
        digests = sorted(encoded, key=lambda digest: -len(encoded[digest].ids))
        chance = [uniforms(self.salt, digest, len(encoded[digest].ids)) for digest in digests]
        return digests, _Shard([encoded[d] for d in digests], [documents[d] for d in digests], chance)

    def _batches(self, shard: _Shard) -> Iterator[Batch]:
        """Rows at most as wide as the longest document, `batch_tokens` tokens at a time."""
        from fusion._causal import batch, one_per_row, pack

        lengths = [len(text.ids) for text in shard.texts]
        width = min(self.header.max_length, max(lengths))
        if width == 0:
            return
        rows = pack(lengths, width) if self.packed else one_per_row(lengths, width)
        count = max(1, self.header.batch_tokens // width)
        for first in range(0, len(rows), count):
            yield batch(rows[first : first + count], [text.ids for text in shard.texts], device=self.device)

    def _batch(self, batch: Batch, shard: _Shard, digests: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Of a forward pass: which predictions, nll, tail, lengths (all (N,)), entry ids and log-probabilities (E,)."""
        import torch

        with torch.inference_mode():
            hidden = self.decoder(**batch.inputs).last_hidden_state
            which, position = shard.predictions(batch, hidden.shape[1])
            hidden = hidden.flatten(0, 1)
            step = max(1, CHUNK // self.header.vocabulary)
            parts = []
            for first in range(0, len(which), step):
                here = which[first : first + step]
                at = torch.from_numpy(position[first : first + step]).to(hidden.device)
                logits = self.head(hidden[at])
                entries = select(logits, self.header.rule, torch.from_numpy(shard.chance[here]).to(logits.device))
                label = torch.from_numpy(shard.ids[here]).to(logits.device)
                nll = entries.normaliser - logits.gather(1, label[:, None])[:, 0].double()
                finite = torch.isfinite(entries.normaliser).cpu().numpy()
                if not finite.all():
                    document, row = self._culprit(batch, shard) or shard.place(int(here[int(np.argmin(finite))]))
                    raise ValueError(
                        f"{self.header.teacher} gives NaN or infinite logits in {self.header.dtype} at row {row} of "
                        f"document {digests[document]}; what was recorded before is whole and is kept"
                    )
                found = (nll, entries.tail, entries.lengths, entries.ids, entries.log_probs)
                parts.append([column.cpu().numpy() for column in found])
        columns = [np.concatenate(column) for column in zip(*parts)] if parts else _nothing()
        return which, *columns

    def _culprit(self, together: Batch, shard: _Shard) -> tuple[int, int] | None:
        """Document of a batch whose logits are not finite when it is alone in its row, and its first such row.

        Attention multiplies what it does not look at by 0, and 0 times NaN is NaN: what stands around the culprit,
        before it too, breaks with it.
        """
        import torch

        from fusion._causal import batch

        def broken(piece: Piece) -> bool:
            inputs = batch([[piece]], [text.ids for text in shard.texts], device=self.device).inputs
            last = self.decoder(**inputs).last_hidden_state[0, -1]
            return not bool(torch.isfinite(self.head(last)).all())

        for piece, _, _ in together.places:
            if broken(piece):  # what precedes the culprit is well: halve until it is found
                whole, low = piece.stop - piece.start, 0
                while whole - low > 1:
                    middle = (low + whole) // 2
                    low, whole = (low, middle) if broken(piece._replace(stop=piece.start + middle)) else (middle, whole)
                return piece.document, piece.start + whole
        return None


class _Shard:
    """Documents laid end to end: prediction number n is row n - starts[d] of the document d that it lies in."""

    def __init__(self, texts: Sequence[Encoded], documents: Sequence[Document], chance: Sequence[np.ndarray]):
        self.texts = list(texts)
        self.starts = np.cumsum([0, *(len(text.ids) for text in texts)])
        self.ids = np.concatenate([text.ids for text in texts])
        self.chance = np.concatenate(chance)
        self.wanted = np.concatenate([_wanted(text, document) for text, document in zip(texts, documents)])

    def predictions(self, batch: Batch, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N,) of the predictions a batch makes, and where in its flattened hidden states (N,) each is made."""
        which, position = [], []
        for piece, row, column in batch.places:
            inside = np.arange(1, piece.stop - piece.start)  # nothing precedes the first token of a window
            number = self.starts[piece.document] + piece.start + inside
            keep = self.wanted[number]
            which.append(number[keep])
            position.append((row * width + column - 1 + inside)[keep])
        return np.concatenate(which), np.concatenate(position)

    def place(self, number: int) -> tuple[int, int]:
        """Document and row of a prediction."""
        document = int(np.searchsorted(self.starts, number, side="right")) - 1
        return document, number - int(self.starts[document])

    def collect(self, parts: Sequence[tuple[np.ndarray, ...]]) -> Iterator[DocumentTargets]:
        """Each document's rows in order, from batches that hold them in any."""
        total = len(self.ids)
        nll, tail = np.full(total, np.nan, np.float32), np.full(total, -np.inf, np.float32)
        lengths = np.zeros(total, np.int64)
        for which, part_nll, part_tail, part_lengths, _, _ in parts:
            nll[which], tail[which], lengths[which] = part_nll, part_tail, part_lengths
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids, log_probs = np.zeros(offsets[-1], np.int64), np.zeros(offsets[-1], np.float32)
        for which, _, _, part_lengths, part_ids, part_log_probs in parts:
            within = np.arange(len(part_ids)) - np.repeat(np.cumsum(part_lengths) - part_lengths, part_lengths)
            goal = np.repeat(offsets[which], part_lengths) + within
            ids[goal], log_probs[goal] = part_ids, part_log_probs
        for text, first, last in zip(self.texts, self.starts[:-1], self.starts[1:]):
            owned = slice(offsets[first], offsets[last])
            yield DocumentTargets(
                ids=text.ids,
                ends=text.ends,
                nll=nll[first:last],
                offsets=offsets[first : last + 1] - offsets[first],
                entry_ids=ids[owned],
                entry_log_probs=log_probs[owned],
                tail=tail[first:last],
            )


def _nothing() -> list[np.ndarray]:
    return [np.zeros(0, dtype) for dtype in (np.float64, np.float32, np.int64, np.int64, np.float32)]


def _wanted(text: Encoded, document: Document) -> np.ndarray:
    """Which rows are worth recording (T,): all of a text; of a conversation the contents and what follows each."""
    if document.messages is None:
        return np.ones(len(text.ids), bool)
    return text.is_content | np.concatenate([[False], text.is_content[:-1]])


def load(
    directory: Path,
    name: str,
    rule: Rule,
    *,
    max_length: int | None,
    batch_tokens: int,
    dtype: str,
    seed: int,
    device: str,
) -> tuple[Teacher, str | None]:
    """The teacher in `directory`, and what to print when documents can't be packed or windows must be shorter.

    Raises ValueError when the tokenizer has more tokens than the head, or the head can't be applied in chunks.
    """
    from fusion import sources
    from fusion._causal import check_head, check_packing, split_head

    tokenizer = sources.load_tokenizer(directory)
    model = sources.load_model(directory, dtype, device=device)
    check_head(model)
    decoder, head = split_head(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{name}: its tokenizer has {len(tokenizer)} tokens and its head only {vocabulary}")
    said = []
    config = model.config.get_text_config().to_dict()
    longest = min([config[field] for field in POSITIONS if config.get(field)], default=max_length or WINDOW)
    if max_length is not None and longest < max_length:
        said.append(f"{name} reads at most {longest} tokens: longer documents are recorded in windows of {longest}")
    packing = check_packing(model)
    if packing is not None:
        said.append(packing)
    digest = sources.digest(directory)
    header = Header(
        teacher=name,
        model=digest,
        tokenizer=sources.tokenizer_digest(directory),
        rule=rule,
        dtype=dtype,
        vocabulary=vocabulary,
        max_length=min(longest, max_length or WINDOW),
        batch_tokens=batch_tokens,
        seed=seed,
    )
    # the weights' digest makes the draws of two teachers independent, so that their errors average out in a mixture
    salt = seed ^ int(digest[:15], 16)
    return Teacher(header, decoder, head, tokenizer, packing is None, device, salt), "; ".join(said) or None
