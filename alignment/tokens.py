"""Byte spans of a tokenization, and the byte boundaries that two tokenizations of one text share.

At a boundary b where a token of both tokenizations ends, and only there, both models have read exactly the same b
bytes, so their next predictions are comparable: if tokens i and j end at b, these are rows i + 1 and j + 1, row t being
the prediction of token t.

Sorted intersection of byte offsets is linear and exact. The published alternative, dynamic time warping with edit
distance between token strings (Wan et al. 2024, arXiv:2401.10491), is quadratic and approximate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from alignment._chat import Message, render
from alignment._pieces import Pieces, fast, pieces, recent_pieces, special_roles, whole

__all__ = ["chat_spans", "ends_of", "shared_boundaries", "spans", "special_roles", "token_bytes"]


def spans(tokenizer: Any, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (T,) and the byte of the original text's UTF-8 at which each token ends (T,), both int64.

    Ends never decrease and the spans tile the text: bytes that a tokenizer drops (white space in WordPiece) belong to
    the following token, trailing ones to the last. Through normalisers, prefixes and byte fallback the ends are those
    of the original text; where several tokens spell one changed character (a ligature read as two letters) all but the
    last are zero-length. `special` adds the tokenizer's own special tokens, zero-length. Raises ValueError for a slow
    tokenizer and for lone surrogates.
    """
    data = _utf8(text)
    backend = fast(tokenizer)
    with whole(backend):
        encoding = backend.encode(text, add_special_tokens=special)
    ids = np.array(encoding.ids, dtype=np.int64)
    return ids, bounds_of(backend, encoding, ids, data, special)[1]


def chat_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (T,), ends (T,) and is_content (T,) bool of messages in the tokenizer's own chat template.

    Ends count the UTF-8 bytes of all contents one after the other, so that they are the same bytes whatever the
    template; tokens of the template are zero-length. A token that straddles the edge of a content is not content. One
    that begins before the content still ends where it ends: its model has read those bytes and no others. One that goes
    on after the content is zero-length and the bytes in it end nowhere, since its model has read more than the content;
    the next token takes them, or none. White space that the template strips around a content belongs to the token
    beside it. Raises ValueError for a template that changes contents otherwise, and for a tokenizer without a template.
    """
    rendered, places = render(tokenizer, messages)
    data = _utf8(rendered)
    backend = fast(tokenizer)
    with whole(backend):
        encoding = backend.encode(rendered, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    starts, stops = bounds_of(backend, encoding, ids, data, False)
    ends = np.zeros_like(ids)
    is_content = np.zeros(len(ids), np.bool_)
    base = 0
    for (first, last, stripped), message in zip(places, messages, strict=True):
        low = len(rendered[:first].encode())
        high = low + len(rendered[first:last].encode())
        reaches = (stops > low) & (stops <= high) & (stops > starts)
        ends[reaches] = base + len(message["content"][:stripped].encode()) + stops[reaches] - low
        is_content |= (starts >= low) & (stops <= high) & ((stops > starts) | ((starts > low) & (stops < high)))
        base += len(message["content"].encode())
        # what was stripped after the content
        ends[reaches & (stops == high)] = base
    return ids, np.maximum.accumulate(ends), is_content


def ends_of(tokenizer: Any, encoding: Encoding, ids: np.ndarray, text: str, special: bool = False) -> np.ndarray:
    """The ends of `spans` for an encoding of `text` that was made already, with its ids (T,) int64."""
    return bounds_of(fast(tokenizer), encoding, ids, _utf8(text), special)[1]


def shared_boundaries(ends_a: np.ndarray, ends_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices i, j (n,) of the tokens of a and of b that end at each byte > 0 where a token of both ends, in order.

    Zero-length tokens never count. Rows i + 1 of a and j + 1 of b are then predictions from the same text. Raises
    ValueError where ends decrease.
    """
    index_a, at_a = _closing(ends_a)
    index_b, at_b = _closing(ends_b)
    if not len(at_a) or not len(at_b):
        return index_a[:0], index_b[:0]
    size = int(max(at_a[-1], at_b[-1])) + 1
    marks = np.zeros(size, np.bool_)
    marks[at_a] = True
    keep_b = marks[at_b]
    marks[at_a] = False
    marks[at_b] = True
    return index_a[marks[at_a]], index_b[keep_b]


def _closing(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ends = np.asarray(ends, dtype=np.int64)
    steps = ends.copy()
    steps[1:] -= ends[:-1]
    if len(steps) and steps.min() < 0:
        where = int(np.argmax(steps < 0))
        raise ValueError(
            f"token ends must not decrease: token {where} ends at byte {ends[where]}, before the token it follows"
        )
    index = np.flatnonzero(steps)
    return index, ends[index]


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of text each id stands for, in the middle of a text; None for special tokens, the unknown token and
    holes.

    A piece that begins a word carries its space. WordPiece drops spaces: its word-initial pieces get one back, closing
    punctuation does not. A byte-level or byte-fallback piece may be part of a character.
    """
    return list(pieces(tokenizer).text)


def bounds_of(
    tokenizer: Tokenizer, encoding: Encoding, ids: np.ndarray, data: bytes, special: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First and end byte of each token, both (T,) int64; the first leaves out what the tokenizer dropped before it."""
    added = np.array(encoding.special_tokens_mask, dtype=np.bool_) if special else None
    if added is None or not added.any():
        return _text_bounds(tokenizer, encoding, ids, None, data)
    starts, ends = np.zeros_like(ids), np.zeros_like(ids)
    starts[~added], ends[~added] = _text_bounds(tokenizer, encoding, ids[~added], ~added, data)
    ends = np.maximum.accumulate(ends)
    return np.where(added, ends, starts), ends


def _text_bounds(
    tokenizer: Tokenizer, encoding: Encoding, ids: np.ndarray, keep: np.ndarray | None, data: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the tokens that stand for text, at `keep` in the encoding."""
    if not len(ids):
        return ids, ids
    table = recent_pieces(tokenizer, int(ids.max()))
    lengths = table.lengths[ids]
    ends = np.cumsum(lengths)
    surplus = int(ends[-1]) - len(data)
    # When the pieces spell the text, or a space and then the text (a dummy prefix), their lengths are the spans:
    # exact, and much faster than reading offsets, which moreover count characters and so cannot divide one.
    if surplus in (0, 1):
        # where in the table each byte of the text should be: from the begin of its token's piece
        where = np.repeat(table.begins[ids] - (ends - lengths), lengths)
        where += np.arange(len(where))
        if table.joined[where].tobytes() == (data if surplus == 0 else b" " + data):
            ends -= surplus
            starts = ends - lengths
            starts[0] = 0
            return starts, ends
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)
    return _from_offsets(table, ids, offsets if keep is None else offsets[keep], data)


def _from_offsets(table: Pieces, ids: np.ndarray, offsets: np.ndarray, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Bounds from character offsets (T, 2), for tokenizers that change or drop text."""
    raw = np.frombuffer(data, np.uint8)
    # byte at which each character begins (continuation bytes are 10xxxxxx), and the end
    begins = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))
    starts, ends = begins[offsets[:, 0]], begins[offsets[:, 1]]
    for k in np.flatnonzero(table.trailing[ids]):
        piece, end = table.literal[ids[k]], int(ends[k])
        tail = piece[len(piece.rstrip()) :]
        # a ByteLevel post-processor may have trimmed white space at the end of the token: give it back
        if not data[end - 1 : end].isspace() and data[end : end + len(tail)] == tail:
            ends[k] = end + len(tail)
    joined = starts[1:] < ends[:-1]
    for first, last in _runs(joined):
        _split_characters(table, ids, starts, ends, data, first, last)
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(data)
    return np.minimum(starts, ends), ends


def _runs(joined: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last token of every run of tokens that share characters."""
    if joined.any():
        edges = np.flatnonzero(np.diff(joined.astype(np.int8), prepend=0, append=0))
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _split_characters(
    table: Pieces, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, data: bytes, first: int, last: int
) -> None:
    """Ends inside characters, from the pieces' own bytes where these spell the run; else the run ends with its last
    token."""
    run = slice(first, last + 1)
    low, high = int(starts[run].min()), int(ends[run].max())
    spelt = b"".join(table.literal[index] for index in ids[run].tolist())
    surplus = len(spelt) - (high - low)
    if spelt == b" " * max(surplus, 0) + data[low:high] and surplus in (0, 1):
        ends[run] = low + np.maximum(np.cumsum(table.lengths[ids[run]]) - surplus, 0)
        starts[first + 1 : last + 1] = ends[first:last]
    else:
        # No byte lies between the pieces of a changed character. All but the last get no length (not even that of white
        # space dropped before them), so that they close no boundary: their model has read more than that.
        starts[run], ends[run] = low, 0
        ends[last] = high


def _utf8(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    if len(data) != len(text) and len(text.encode("utf-8", "ignore")) != len(data):
        where = next(k for k, c in enumerate(text) if "\ud800" <= c <= "\udfff")
        raise ValueError(
            f"character {where} of the text is a lone surrogate ({text[where]!a}), which UTF-8 cannot write"
        )
    return data
