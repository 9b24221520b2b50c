"""What each id of a tokenizer stands for: its bytes, its role.

Three spellings of bytes are in use. Byte-level BPE (Radford et al. 2019) writes each byte as one of 256 printable
characters; SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) writes a space as U+2581 and a byte outside its
alphabet as <0xHH>; WordPiece drops white space and marks a piece inside a word with ## (Devlin et al. 2019,
arXiv:1810.04805).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

# WordPiece drops the space before a word. These, alone, usually follow the word before them without one.
_CLOSING = frozenset(".,;:!?)]}%'’”")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A spelling with this private-use character in front is decoded without it and never produced (alignment/union.py).
APART = "\ue0f2"

# A role is what a special token is for; its spelling differs from model to model. First spelling present wins.
_SPELLINGS = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<BOS_TOKEN>", "[BOS]"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<EOS_TOKEN>", "[EOS]"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "sep": ("[SEP]", "<sep>"),
    "cls": ("[CLS]", "<cls>"),
    "mask": ("[MASK]", "<mask>"),
    "eot": ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>"),
}


@dataclass(frozen=True, eq=False)
class Pieces:
    """The vocabulary of one tokenizer as bytes; all sequences have one entry per id."""

    text: list[bytes | None]  # bytes of text an id stands for; None: special, unknown, or a hole
    literal: list[bytes]  # the same, but a special stands for its own spelling: what it covers where a text contains it
    lengths: np.ndarray  # (V,) int64: of literal
    begins: np.ndarray  # (V,) int64: where in `joined` each begins
    joined: np.ndarray  # (sum of lengths,) uint8: all of literal, one after the other
    spelling: list[str | None]  # the vocabulary's own strings
    special: frozenset[int]  # ids of special tokens and of the unknown token
    fallback: frozenset[int]  # ids spelt <0xHH>, used only where no other piece has the byte
    drops_space: bool  # white space between words leaves no trace (WordPiece, WordLevel)
    trailing: np.ndarray  # (V,) bool: white space after something else, which post-processors may trim from offsets


def is_text(data: bytes) -> bool:
    """Whether the bytes are whole characters."""
    return data.decode("utf-8", "ignore").encode() == data


def fast(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside a fast transformers tokenizer, or the argument if it is one already."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if hasattr(tokenizer, "backend_tokenizer") and isinstance(tokenizer.backend_tokenizer, Tokenizer):
        return tokenizer.backend_tokenizer
    raise ValueError(
        f"a {type(tokenizer).__name__} cannot say which characters each token covers: give a tokenizers.Tokenizer or a "
        "fast transformers tokenizer (one with tokenizer.json); a slow tokenizer is not enough"
    )


@contextmanager
def whole(tokenizer: Tokenizer) -> Iterator[None]:
    """Truncation and padding, which transformers leaves behind in a tokenizer, set aside: every token of the text is
    wanted."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    if truncation is None and padding is None:
        yield
        return
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


def parts(component: Any) -> list[dict[str, Any]]:
    """The normalizer, pre-tokenizer or decoder as a flat list of its settings, sequences opened."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()))


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    inner = next(state[key] for key in ("decoders", "normalizers", "pretokenizers") if key in state)
    return [leaf for item in inner for leaf in _flat(item)]


def byte_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level BPE and their bytes: printable Latin-1 stands for itself, the others follow from
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(rest)}


def pieces(tokenizer: Any) -> Pieces:
    """The table of a tokenizer, made once: it is kept for the last eight tokenizers, until tokens are added to them."""
    backend = fast(tokenizer)
    return _pieces(backend, backend.get_vocab_size(with_added_tokens=True))


def recent_pieces(tokenizer: Tokenizer, largest: int) -> Pieces:
    """The table made when the tokenizer was first seen, while it has this id: asking for the size each time is slow."""
    table = _first_seen(tokenizer)
    return table if largest < len(table.text) else pieces(tokenizer)


@lru_cache(maxsize=8)
def _first_seen(tokenizer: Tokenizer) -> Pieces:
    return pieces(tokenizer)


@lru_cache(maxsize=8)
def _pieces(tokenizer: Tokenizer, size: int) -> Pieces:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    total = max(vocabulary.values(), default=-1) + 1
    spelling: list[str | None] = [None] * total
    for string, index in vocabulary.items():
        spelling[index] = string
    convert = converter(tokenizer)
    literal = [b"" if string is None else convert(string) for string in spelling]
    special = set(_unknown(tokenizer))
    for index in special:
        literal[index] = b""
    space = space_mark(tokenizer)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        literal[index] = token.content.encode() if token.special else token.content.replace(space, " ").encode()
        if token.special:
            special.add(index)
    falls_back = _falls_back(tokenizer)
    hidden = special | {index for index, string in enumerate(spelling) if string is None}
    lengths = np.fromiter(map(len, literal), np.int64, total)
    return Pieces(
        text=[None if index in hidden else data for index, data in enumerate(literal)],
        literal=literal,
        lengths=lengths,
        begins=np.cumsum(lengths) - lengths,
        joined=np.frombuffer(b"".join(literal), np.uint8),
        spelling=spelling,
        special=frozenset(special),
        fallback=frozenset(i for i, s in enumerate(spelling) if falls_back and s is not None and _BYTE.fullmatch(s)),
        drops_space=isinstance(tokenizer.model, models.WordPiece | models.WordLevel),
        trailing=np.fromiter((d[-1:].isspace() and not d.isspace() for d in literal), np.bool_, total),
    )


def _falls_back(tokenizer: Tokenizer) -> bool:
    decoders = {part["type"] for part in parts(tokenizer.decoder)}
    return "ByteFallback" in decoders or (isinstance(tokenizer.model, models.BPE) and tokenizer.model.byte_fallback)


def space_mark(tokenizer: Tokenizer) -> str:
    """The character that stands for a space (U+2581 by custom), or a space where none does."""
    for part in parts(tokenizer.decoder) + parts(tokenizer.pre_tokenizer):
        if part["type"] == "Metaspace":
            return part["replacement"]
    for part in parts(tokenizer.decoder):
        if part["type"] == "Replace" and part["content"] == " " and len(part["pattern"].get("String", "")) == 1:
            return part["pattern"]["String"]
    for part in parts(tokenizer.normalizer):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            return part["content"]
    return " "


def converter(tokenizer: Tokenizer) -> Any:
    """The function from a spelling in the vocabulary to the bytes of text it stands for."""
    plain = _converter(tokenizer)
    return lambda string: plain(string.removeprefix(APART))


def _converter(tokenizer: Tokenizer) -> Any:
    model = tokenizer.model
    seen = {
        part["type"] for part in parts(tokenizer.decoder) + parts(tokenizer.pre_tokenizer) + parts(tokenizer.normalizer)
    }
    if "ByteLevel" in seen:
        # characters outside the alphabet occur in tokens that were added to the vocabulary as plain text
        table = {ord(c): bytes([b]) for c, b in byte_alphabet().items()}
        return lambda string: b"".join([table.get(ord(c)) or c.encode() for c in string])
    if isinstance(model, models.WordPiece | models.WordLevel):
        prefix = model.continuing_subword_prefix if isinstance(model, models.WordPiece) else ""
        return lambda string: _word(string, prefix)
    space = space_mark(tokenizer)
    falls_back = _falls_back(tokenizer)
    suffix = (model.end_of_word_suffix or "") if isinstance(model, models.BPE) else ""

    def convert(string: str) -> bytes:
        if falls_back and (match := _BYTE.fullmatch(string)):
            return bytes([int(match[1], 16)])
        return (string.removesuffix(suffix) if suffix else string).replace(space, " ").encode()

    return convert


def _word(string: str, prefix: str) -> bytes:
    if prefix and string.startswith(prefix) and string != prefix:
        return string[len(prefix) :].encode()
    return string.encode() if string in _CLOSING else b" " + string.encode()


def _unknown(tokenizer: Tokenizer) -> list[int]:
    """The id of the unknown token, if there is one: it stands for no text in particular."""
    model = tokenizer.model
    if isinstance(model, models.Unigram):
        index = json.loads(model.__getstate__())["unk_id"]
    else:
        index = model.token_to_id(model.unk_token) if model.unk_token is not None else None
    return [] if index is None else [index]


def special_roles(tokenizer: Any) -> dict[str, int]:
    """Roles (bos eos unk pad sep cls mask, and eot: end of a chat turn) and their ids, those the tokenizer has.

    A transformers tokenizer says its roles itself; of a bare `tokenizers.Tokenizer`, and for eot always, they are read
    off the spellings in use. One id may hold several roles.
    """
    backend = fast(tokenizer)
    roles: dict[str, int] = {}
    if hasattr(tokenizer, "special_tokens_map"):
        for name, value in tokenizer.special_tokens_map.items():
            role, index = name.removesuffix("_token"), backend.token_to_id(str(value))
            if role in _SPELLINGS and index is not None:
                roles[role] = index
    declared = frozenset(roles)
    special = pieces(tokenizer).special
    for role, spellings in _SPELLINGS.items():
        found = [index for s in spellings if (index := backend.token_to_id(s)) is not None and index in special]
        # a model that declares its roles and leaves one out means it (Qwen has no bos)
        if role not in roles and found and (role == "eot" or not declared):
            roles[role] = found[0]
    return roles
