"""One tokenizer that cuts text as the first of several does and also knows the tokens of the others.

The others' tokens get ids after the first one's, spelt with a mark in front that no text has. So the tokenizer decodes
them (its decoder takes the mark away) but never produces them, whatever its kind: byte-pair merges, Unigram scores and
WordPiece's longest match see no such piece in a text. Their special tokens are the exception: those are produced where
a text contains their very spelling, as in the tokenizer they come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from alignment._edit import exact_ids
from alignment._first import specials
from alignment._pieces import APART, byte_alphabet, converter, fast, parts, pieces, space_mark


@dataclass(frozen=True, eq=False)
class Union:
    """A tokenizer of V ids: id v was `origin[v, 1]` in tokenizer `origin[v, 0]` (-1 for an id that nobody uses)."""

    tokenizer: Tokenizer
    origin: np.ndarray  # (V, 2) int64
    left_out: int  # tokens of the others that the first one's alphabet cannot spell: parts of characters


def counterparts(source: Any, target: Any) -> np.ndarray:
    """(V_source,) int64: the target's id of each source token, -1 for none: one of the same bytes, if possible of the
    same spelling; special tokens by spelling, or else by role."""
    give, take = pieces(source), pieces(target)
    found, _ = exact_ids(source, target)
    known = {spelling: index for index, spelling in enumerate(take.spelling) if spelling is not None}
    for index, spelling in enumerate(give.spelling):
        twin = known.get(spelling, -1) if spelling is not None else -1
        if twin >= 0 and (give.text[index] == take.text[twin]) and (index in give.special) == (twin in take.special):
            found[index] = twin
    return found


def union(tokenizers: Sequence[Any]) -> Union:
    """The tokenizer of all tokens: those of the first under their ids, then those of the others that are new in bytes
    (special ones: in spelling and role), in their order."""
    first = fast(tokenizers[0])
    base = pieces(first)
    origin = [(0 if spelling is not None else -1, index) for index, spelling in enumerate(base.spelling)]
    taken = {spelling for spelling in base.spelling if spelling is not None}
    known = {data for data in base.text if data}
    spell = _speller(first)
    fresh: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    left_out = 0
    for number, tokenizer in enumerate(tokenizers[1:], start=1):
        give, settings = pieces(tokenizer), fast(tokenizer).get_added_tokens_decoder()
        lost = {index for index, counterpart in specials(tokenizer, tokenizers[0]).items() if counterpart < 0}
        for index, data in enumerate(give.text):
            if index in lost and give.spelling[index] not in taken:
                spelling = str(give.spelling[index])
                token = settings.get(index)
                flags = {name: bool(token and getattr(token, name)) for name in ("single_word", "lstrip", "rstrip")}
                added.append({"id": len(origin), "content": spelling, **flags, "normalized": False, "special": True})
            elif data and data not in known:
                found = spell(data)
                if found is None or found in taken:
                    left_out += 1
                    continue
                spelling = found
                known.add(data)
            else:
                continue
            taken.add(spelling)
            fresh[spelling] = len(origin)
            origin.append((number, index))
    return Union(_extended(first, fresh, added, len(origin)), np.array(origin, np.int64), left_out)


def _extended(first: Tokenizer, fresh: dict[str, int], added: list[dict[str, Any]], size: int) -> Tokenizer:
    if not fresh:
        return first
    state = json.loads(first.to_str())
    model = state["model"]
    # Ids of added tokens are counted on from the model's size when they are not in its vocabulary, which has grown.
    inside = {token["content"]: token["id"] for token in state["added_tokens"]} | fresh
    if isinstance(model["vocab"], dict):
        model["vocab"] |= inside
    else:
        entries = dict(enumerate(model["vocab"]))
        lowest = min((score for _, score in model["vocab"]), default=0.0)  # the unknown token's score hangs on it
        entries |= {index: [spelling, lowest] for spelling, index in inside.items() if index not in entries}
        model["vocab"] = [entries.get(index, [f"{APART}{APART}{index}", lowest]) for index in range(size)]
    state["added_tokens"] += added
    if state["decoder"] is not None:
        unmark = {"type": "Replace", "pattern": {"String": APART}, "content": ""}
        state["decoder"] = {"type": "Sequence", "decoders": [unmark, *parts(first.decoder)]}
    result = Tokenizer.from_str(json.dumps(state))
    vocabulary = result.get_vocab(with_added_tokens=True)
    assert all(vocabulary[spelling] == index for spelling, index in inside.items())
    return result


def _speller(tokenizer: Tokenizer) -> Callable[[bytes], str | None]:
    """From bytes to how the tokenizer's vocabulary would spell them, the mark in front; None where it cannot."""
    read, model = converter(tokenizer), tokenizer.model
    components = (tokenizer.decoder, tokenizer.pre_tokenizer, tokenizer.normalizer)
    byte_level = any(part["type"] == "ByteLevel" for component in components for part in parts(component))
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    prefix = (model.continuing_subword_prefix or "") if isinstance(model, models.WordPiece) else ""
    words = isinstance(model, models.WordPiece | models.WordLevel)
    space = space_mark(tokenizer)

    def spell(data: bytes) -> str | None:
        if byte_level:
            return APART + "".join(letters[byte] for byte in data)
        text = data.decode("utf-8", "replace")
        if words:
            spelt = text[1:] if text[:1] == " " else prefix + text
        else:
            spelt = text.replace(" ", space)
        return APART + spelt if read(APART + spelt) == data else None

    return spell
