"""Small real tokenizers of every kind, trained on one text that has accents, CJK, emoji, code and digits in it."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. There they are, thereafter the others followed them.",
    "Die Straße führt über die Brücke; Größe und Übermut täuschen nicht, naïve façade.",
    "def add(a, b):\n    return a + b  # 201 items\n\nfor i in range(10):\n\tprint(i, 1234567890)\n",
    "日本語のテキストです。漢字とかな。中文的句子。",
    "Emoji: 😀 😃 👨‍👩‍👧 🇩🇪; maths: ∑ ∫ ≤ ½; ligature: ﬁne ﬂow.",
    "Spaces:  two   three    four; quotes \"so\" and 'thus'. Why? No! Yes: (maybe).",
    "the thing that then thins the other thing; walking talking, walked talked, unhappiness happily.",
] * 4

KINDS = ("byte_level", "metaspace", "unigram", "wordpiece", "bytes")


@cache
def train(kind: str, vocab_size: int = 600, offset: int = 0) -> Tokenizer:
    """One tokenizer, trained once a session; `offset` leaves out the first texts: a second one of its kind differs."""
    return build(kind, TEXT[offset:], vocab_size)


def build(kind: str, text: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS, or of the variants below, trained on the texts."""
    return {
        "byte_level": _byte_level,
        "metaspace": _metaspace,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
        "bytes": _bytes,
        "nfkc_byte_level": _nfkc_byte_level,
        "digits": _digits,
        "legacy_llama": _legacy_llama,
    }[kind](text, vocab_size)


def _byte_level(text: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE without a prefix space, as GPT-2's with an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _nfkc_byte_level(text: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE behind NFKC and lower-casing, offsets trimmed by the post-processor (RoBERTa's)."""
    tokenizer = _byte_level([t.lower() for t in text], vocab_size)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _digits(text: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def _metaspace_bpe(text: list[str], vocab_size: int) -> dict:
    """The state of a BPE over U+2581 text with byte fallback: few characters of its own, so that fallback happens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size + 256,
            special_tokens=["<unk>", "<s>", "</s>", *_FALLBACK],
            limit_alphabet=80,
            show_progress=False,
        ),
    )
    state = json.loads(tokenizer.to_str())
    # trained as special tokens to be in the vocabulary; as part of it they are not special
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in set(_FALLBACK)]
    return state


def _metaspace(text: list[str], vocab_size: int) -> Tokenizer:
    """SentencePiece-like BPE: U+2581 for spaces, a dummy prefix, byte fallback, <s> before every text."""
    tokenizer = Tokenizer.from_str(json.dumps(_metaspace_bpe(text, vocab_size)))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _legacy_llama(text: list[str], vocab_size: int) -> Tokenizer:
    """The same with its prefix and spaces in the normaliser, no pre-tokenizer (Llama 2 as transformers converts it)."""
    state = _metaspace_bpe(text, vocab_size)
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _unigram(text: list[str], vocab_size: int) -> Tokenizer:
    """Unigram as T5's: NFKC, white space split and marked, an unknown token, </s> after every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        text,
        trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _wordpiece(text: list[str], vocab_size: int) -> Tokenizer:
    """WordPiece as uncased BERT's: lower case, accents stripped, white space dropped, [CLS] and [SEP] around."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        text,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _bytes(text: list[str], vocab_size: int) -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def byte_bpe(pieces: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE with exactly these pieces (ASCII, no spaces), for vocabularies planned by hand."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
