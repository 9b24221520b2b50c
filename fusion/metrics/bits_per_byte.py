"""Bits per byte of UTF-8: how well a model predicts a text, comparable whatever the tokenizers.

Total nats of all tokens / ln 2 / bytes (as in Gao et al. 2020, The Pile, arXiv:2101.00027). One tokenization is one way
to spell the text, so this is an upper bound: the probability of the other spellings is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fusion.data import Document, encode
from fusion.metrics._score import nats, width_for

RESAMPLES = 1000


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int = 1024,
    stride: int = 512,
    batch_tokens: int = 4096,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, float]:
    """Bits per byte over documents, with bytes, tokens, tokens per byte and stderr, the standard error over documents.

    window, stride: tokens; a document longer than the window is read in windows `stride` apart, so that every token is
    scored once with at least window - stride tokens before it. A model with fewer positions gets a window that fits.
    The text's end token is not scored; of a conversation only message contents are, in the model's own template.
    Raises ValueError for a stride that leaves no context and for documents without text.
    """
    if not 0 < stride < window:
        raise ValueError(
            f"bits_per_byte: stride must be between 1 and window - 1; given: stride {stride}, window {window}"
        )
    width = width_for(model, window)
    step = min(stride, max(1, width // 2)) if width < window else stride
    sequences, sizes, tokens = [], [], 0
    for document in documents:
        encoded = encode(tokenizer, document)
        sequences.append((encoded.ids, encoded.is_content))
        sizes.append(document.size)
        tokens += int(encoded.is_content.sum())
    size = np.array(sizes, dtype=np.float64)
    if not size.sum():
        raise ValueError("bits_per_byte: the documents hold no text")
    totals = nats(model, sequences, window=width, stride=step, batch_tokens=batch_tokens, progress=progress)
    if not np.isfinite(totals).all():
        number = int(np.flatnonzero(~np.isfinite(totals))[0])
        raise ValueError(
            f"bits_per_byte: the model gives no finite probability in document {number} ({totals[number]})"
        )
    result: dict[str, float] = {
        "bits_per_byte": float(totals.sum() / size.sum() / math.log(2)),
        "bytes": int(size.sum()),
        "tokens": tokens,
        "tokens_per_byte": float(tokens / size.sum()),
        "documents": len(sizes),
        "window": width,
    }
    if len(sizes) > 1:  # one document says nothing about others
        result["stderr"] = standard_error(totals / math.log(2), size)
    return result


def standard_error(bits: np.ndarray, size: np.ndarray) -> float:
    """The standard deviation of sum(bits) / sum(size) under resampling of whole documents (Efron 1979).

    bits, size: (D,).
    """
    counts = np.random.default_rng(0).multinomial(len(bits), np.full(len(bits), 1 / len(bits)), size=RESAMPLES)
    drawn = counts @ size
    return float(((counts @ bits)[drawn > 0] / drawn[drawn > 0]).std())
