"""The first piece: which token of one vocabulary the bytes of another vocabulary's token begin with, in the middle of a
text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from alignment._pieces import Pieces, fast, is_text, parts, pieces, special_roles, whole

_CHUNK = 16384  # strings a call: bounds the memory of encode_batch


def first_pieces(source: Any, target: Any) -> np.ndarray:
    """For each id of `source` (V_source,) int64: the id in `target` of the first piece of its bytes, -1 where there is
    none.

    The piece is the first token of the target's own encoding of the bytes; its bytes begin those bytes (for a target
    that lower-cases or normalises: begin them so changed). A part of a character, which cannot be encoded, goes to the
    longest piece it begins with. White space is encoded before a word, since tokenizers leave the last of it to the
    word: a run of two spaces is one space and " word" elsewhere. Special tokens go to the special token of the same
    role or spelling, or to -1.
    """
    give = pieces(source)
    result = np.full(len(give.text), -1, np.int64)
    known = [(index, data) for index, data in enumerate(give.text) if data]
    result[[index for index, _ in known]] = encoded_firsts([data for _, data in known], target)
    take = pieces(target)
    for index, first in before_a_word(source, target).items():
        if _chosen(take, (first,), give.text[index] or b"") >= 0:
            result[index] = first
    for index, counterpart in specials(source, target).items():
        result[index] = counterpart
    return result


def before_a_word(source: Any, target: Any) -> dict[int, int]:
    """White-space ids of `source` -> the white space that `target` begins with where a word follows; it may be longer.

    The word is put so that the source itself begins with that very token: right after it, or after one more space.
    """
    give, take = pieces(source), pieces(target)
    sides = [mid_text(fast(tokenizer)) or fast(tokenizer) for tokenizer in (source, target)]
    runs = [(i, d) for i, d in enumerate(give.text) if d and d.decode("utf-8", "replace").isspace()]
    result: dict[int, int] = {}
    for word in (" a", "a"):  # where the source allows both, the word right after counts
        texts = [data.decode() + word for _, data in runs]
        ours, theirs = (_first_ids(side, texts) for side in sides)
        for (index, data), own, first in zip(runs, ours, theirs, strict=True):
            if own >= 0 and first >= 0 and give.text[own] == data and (piece := take.text[first]):
                nested = data.startswith(piece) or piece.startswith(data)
                if nested and piece.decode("utf-8", "replace").isspace():
                    result[index] = first
    return result


def encoded_firsts(strings: Sequence[bytes], target: Any) -> np.ndarray:
    """(N,) int64: for each of N non-empty byte strings the id in `target` of its first piece, -1 for none."""
    take, backend = pieces(target), fast(target)
    result = np.full(len(strings), -1, np.int64)
    known = list(enumerate(strings))
    pending: list[tuple[int, bytes, tuple[int, ...]]] = [(i, data, ()) for i, data in known if not is_text(data)]
    for index, data, candidates in _encoded([(i, data) for i, data in known if is_text(data)], backend):
        chosen = _chosen(take, candidates, data)
        if chosen >= 0:
            result[index] = chosen
        else:
            pending.append((index, data, candidates))
    longest = lowest_ids(take) if pending else {}
    for index, data, candidates in pending:
        result[index] = _resort(take, longest, candidates, data, _normalised(data, backend, take))
    return result


def _chosen(take: Pieces, candidates: tuple[int, ...], data: bytes) -> int:
    """The first candidate whose bytes begin the data, or -1."""
    return next((c for c in candidates if c >= 0 and (piece := take.text[c]) and data.startswith(piece)), -1)


def _encoded(items: list[tuple[int, bytes]], target: Tokenizer) -> Iterator[tuple[int, bytes, tuple[int, ...]]]:
    """Each (index, bytes) with the first token of its encoding without, then with, what the tokenizer adds at the start
    of a text."""
    inside = mid_text(target)
    plain = inside if inside is not None else target
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        texts = [data.decode() for _, data in chunk]
        firsts = [_first_ids(plain, texts)]
        if inside is not None:
            # a tokenizer that drops spaces and marks words (T5) needs its mark back on pieces that begin with a space
            firsts.append(_first_ids(target, texts))
        for (index, data), candidates in zip(chunk, zip(*firsts, strict=True), strict=True):
            yield index, data, candidates


def _first_ids(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    with whole(tokenizer):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [ids[0] if (ids := encoding.ids) else -1 for encoding in encodings]


def mid_text(tokenizer: Tokenizer) -> Tokenizer | None:
    """The same tokenizer without the space it adds at the start of a text, or None when it adds none; the model is
    shared."""
    normalizer, pre_tokenizer = parts(tokenizer.normalizer), parts(tokenizer.pre_tokenizer)
    kept = [part for part in normalizer if part["type"] != "Prepend"]
    changed = []
    for part in pre_tokenizer:
        if part["type"] == "Metaspace":
            part = part | {"prepend_scheme": "never"}
        elif part["type"] == "ByteLevel":
            part = part | {"add_prefix_space": False}
        changed.append(part)
    if kept == normalizer and changed == pre_tokenizer:
        return None
    shell: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed} if changed else None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    empty = Tokenizer.from_str(json.dumps(shell))
    copy = Tokenizer(tokenizer.model)
    if empty.normalizer is not None:
        copy.normalizer = empty.normalizer
    if empty.pre_tokenizer is not None:
        copy.pre_tokenizer = empty.pre_tokenizer
    copy.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    return copy


def lowest_ids(take: Pieces) -> dict[bytes, int]:
    """Bytes -> id: the lowest id where several share them, byte-fallback pieces only where nothing else has the
    byte."""
    table: dict[bytes, int] = {}
    for wanted in (False, True):
        for index, data in enumerate(take.text):
            if data and (index in take.fallback) is wanted:
                table.setdefault(data, index)
    return table


def _normalised(data: bytes, target: Tokenizer, take: Pieces) -> bytes:
    """The bytes as the target sees them: normalised, and one space for the white space before a word if it drops
    that."""
    text = data.decode("utf-8", "ignore")
    if target.normalizer is not None:
        text = target.normalizer.normalize_str(text).replace("\u2581", " ")
    if take.drops_space and text[:1].isspace():
        text = " " + text.lstrip()
    return text.encode()


def _resort(take: Pieces, table: dict[bytes, int], candidates: tuple[int, ...], data: bytes, seen: bytes) -> int:
    """The longest piece that begins the bytes, or else the piece that begins them as the target sees them."""
    found = _longest(table, data)
    if found < 0:
        found = _chosen(take, candidates, seen)
    if found < 0 and take.drops_space and seen[:1] == b" ":
        # " ," is "," to a tokenizer without spaces
        found = _chosen(take, candidates, seen[1:])
    return found if found >= 0 else _longest(table, seen)


def _longest(table: dict[bytes, int], data: bytes) -> int:
    return next((table[data[:n]] for n in range(len(data), 0, -1) if data[:n] in table), -1)


def specials(source: Any, target: Any) -> dict[int, int]:
    """Special ids of the source -> id of the same role in the target, or of the same spelling where neither says a
    role; others -> -1."""
    give, take = pieces(source), pieces(target)
    roles, counterparts = special_roles(source), special_roles(target)
    result = dict.fromkeys(give.special, -1)
    named, taken = set(roles.values()), set(counterparts.values())
    spelt = {take.spelling[index]: index for index in take.special - taken}
    for index in give.special - named:
        result[index] = spelt.get(give.spelling[index], -1)
    for role in (
        "pad",
        "unk",
        "mask",
        "cls",
        "sep",
        "bos",
        "eot",
        "eos",
    ):  # a later role prevails where one id holds several
        if role in roles and role in counterparts and _primary(counterparts, role):
            result[roles[role]] = counterparts[role]
    return result


def _primary(roles: dict[str, int], role: str) -> bool:
    """False where padding or the unknown token borrows an id that has a role of its own: those are never predicted, the
    other is."""
    return role not in ("pad", "unk") or all(roles[role] != index for other, index in roles.items() if other != role)
