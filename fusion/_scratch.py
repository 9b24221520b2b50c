"""A model from scratch: a tokenizer trained on a data set of the recipe, and weights drawn under the recipe's seed.

Tokenizers: byte-level BPE (Radford et al. 2019), Unigram with byte fallback (Kudo 2018, arXiv:1804.10959),
WordPiece (Schuster and Nakajima 2012), bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusion._once import made_once
from fusion._say import nearest

KINDS = ("bpe", "unigram", "wordpiece", "bytes")
FIELDS = ("train", "vocab_size", "data")
BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SMALLEST = {"bpe": 256 + 3, "unigram": 256 + 4 + 128, "wordpiece": 128}  # bytes, specials, room for letters


def check(place: str, config: dict[str, Any], tokenizer: dict[str, Any] | None) -> None:
    """Raises ValueError for what can't be made, without importing transformers."""
    if "model_type" not in config:
        raise ValueError(f"{place}.config: model_type is required (llama, gpt2, ...)")
    if not tokenizer:
        raise ValueError(f"{place}: a model from scratch needs tokenizer: {{train: bpe, vocab_size: N, data: NAME}}")
    place = f"{place}.tokenizer"
    for field in tokenizer:
        _known(place, "field", field, FIELDS)
    if "train" not in tokenizer:
        raise ValueError(f"{place}: train is required ({', '.join(KINDS)})")
    kind = tokenizer["train"]
    _known(place, "train", kind, KINDS)
    if kind == "bytes":
        return
    if not isinstance(tokenizer.get("data"), str):
        raise ValueError(f"{place}: data is required: the name of the data set that {kind} is trained on")
    size = tokenizer.get("vocab_size")
    if not isinstance(size, int) or size < SMALLEST[kind]:
        raise ValueError(f"{place}: vocab_size must be a whole number of at least {SMALLEST[kind]}; given: {size!r}")


def _known(place: str, what: str, given: Any, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{place}: unknown {what} {given!r}{nearest(given, allowed)}")


def make(
    name: str,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    cache: Path,
    texts: Callable[[str], Iterable[str]],
    seed: int,
    place: str,
) -> Path:
    """The directory in `cache`, named by the digest of fields, texts, seed, name and library versions."""
    state = hashlib.blake2b(digest_size=8)
    versions = {package: version(package) for package in ("torch", "transformers", "tokenizers")}
    state.update(json.dumps([name, config, tokenizer, seed, versions], sort_keys=True).encode())
    data = tokenizer.get("data")
    if data:
        empty = True
        for text in texts(data):
            raw = text.encode("utf-8")
            state.update(len(raw).to_bytes(8, "little") + raw)
            empty = empty and not raw
        if empty:
            raise ValueError(f"{place}.tokenizer: data {data!r} has no text to train a tokenizer on")

    def fill(folder: Path) -> None:
        trained = fast(train(tokenizer["train"], tokenizer.get("vocab_size", 0), texts(data) if data else []))
        initialise(name, config, trained, seed, place).save_pretrained(folder)
        trained.save_pretrained(folder)
        source = {"name": name, "config": config, "tokenizer": tokenizer, "seed": seed, **versions}
        (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")

    return made_once(cache / f"scratch-{state.hexdigest()}", fill)


def fast(tokenizer: Any) -> Any:
    """The trained tokenizer as transformers' fast one, which opens every text with <bos>."""
    from transformers import PreTrainedTokenizerFast

    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    if tokenizer.token_to_id(UNK) is not None:
        specials["unk_token"] = UNK
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials)


def train(kind: str, vocab_size: int, texts: Iterable[str]) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens; the same texts give the same one, bit for bit."""
    from tokenizers import AddedToken, processors

    # One thread: sums of floats in the Unigram trainer would otherwise depend on the order in which threads finish.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    learn = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece, "bytes": _bytes}[kind]
    tokenizer = learn(vocab_size, iter(texts))
    if before is None:
        del os.environ["TOKENIZERS_PARALLELISM"]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = before
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _bpe(vocab_size: int, texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(vocab_size: int, texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    # No space is put before a text: pieces of code begin with the very spaces that this would make ambiguous.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 256, special_tokens=[UNK, BOS, EOS, PAD], unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    # The trainer goes through hash maps: the last digits of its scores, and the order in which it lifts letters
    # without a score of their own 1e-4 apart above the lowest one, differ from process to process. Neither may count.
    lowest = min(score for _, score in learnt[4:])
    lifted = lowest + 1e-4 * len(learnt)
    scores = {piece: round(lowest if len(piece) == 1 and score < lifted else score, 6) for piece, score in learnt[4:]}
    rest = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    # The 256 byte pieces that every SentencePiece model with byte fallback has, never preferred to a learnt piece.
    worst = rest[-1][1] - 10.0
    pieces = learnt[:4] + [(f"<0x{byte:02X}>", worst) for byte in range(256)] + rest
    tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _wordpiece(vocab_size: int, texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    split = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    inner: Counter[str] = Counter()
    for word, count in words.items():
        inner.update({f"##{char}": count for char in word[1:]})
    # Equally frequent pairs are merged in the order of ids, and continuing letters get theirs in the order of a hash
    # map: naming them beforehand is what makes two trainings agree. They are special to the trainer only.
    letters = sorted(sorted(inner), key=lambda piece: -inner[piece])[: max(0, vocab_size // 4)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS, PAD, *letters],
        limit_alphabet=max(1, vocab_size // 4),
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token=UNK))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator((" ".join([word] * count) for word, count in sorted(words.items())), trainer)
    tokenizer = Tokenizer(models.WordPiece(vocab=trained.get_vocab(), unk_token=UNK))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _bytes(vocab_size: int, texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def initialise(name: str, config: dict[str, Any], tokenizer: Any, seed: int, place: str) -> Any:
    """A causal language model with random weights that depend on (seed, name) and the configuration alone."""
    import dataclasses

    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    place = f"{place}.config"
    _known(place, "model_type", config["model_type"], CONFIG_MAPPING.keys())
    kind = CONFIG_MAPPING[config["model_type"]]
    fields = {k: v for k, v in config.items() if k != "model_type"}
    for field in fields:
        _known(place, "field", field, [f.name for f in dataclasses.fields(kind)] + list(kind.attribute_map))
    if fields.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise ValueError(
            f"{place}: vocab_size {fields['vocab_size']} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    roles = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    full = AutoConfig.for_model(config["model_type"], **{"vocab_size": len(tokenizer), **roles, **fields})
    word = hashlib.blake2b(json.dumps([seed, name]).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(word, "little") >> 1)
        return AutoModelForCausalLM.from_config(full, dtype=torch.float32)
