"""BLiMP: does the model find the grammatical one of two sentences likelier (Warstadt et al. 2020, arXiv:1912.00582)?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fusion.data import Document, encode
from fusion.metrics._score import nats, width_for


def blimp(
    model: Any,
    tokenizer: Any,
    *,
    path: str,
    base: Path = Path("."),
    limit: int | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Accuracy on minimal pairs by total log-likelihood: per paradigm, their mean, its standard error, pairs.

    path: a directory of *.jsonl files with sentence_good and sentence_bad, one paradigm each, relative to the recipe.
    limit: pairs taken of each paradigm, from the start.  A tie counts one half.
    Raises ValueError for a directory without pairs and for lines without the two sentences.
    """
    paradigms = read(Path(base) / Path(path).expanduser(), limit)
    texts = [text for pairs in paradigms.values() for pair in pairs for text in pair]
    unique = sorted(set(texts))  # paradigms share sentences
    encoded = [encode(tokenizer, Document.of(text)) for text in unique]
    width = width_for(model, max(len(one.ids) for one in encoded))
    sequences = [(one.ids, one.is_content) for one in encoded]
    totals = nats(
        model, sequences, window=width, stride=max(1, width // 2), batch_tokens=batch_tokens, progress=progress
    )
    cost = dict(zip(unique, totals, strict=True))
    hits = {
        name: np.array([0.5 * (cost[good] <= cost[bad]) + 0.5 * (cost[good] < cost[bad]) for good, bad in pairs])
        for name, pairs in paradigms.items()
    }
    accuracy = {name: float(one.mean()) for name, one in hits.items()}
    # Pairs are drawn, paradigms are not: the variances of the paradigms' means add up.
    variance = sum(one.var() / len(one) for one in hits.values()) / len(hits) ** 2
    return {
        "accuracy": float(np.mean(list(accuracy.values()))),
        "stderr": float(np.sqrt(variance)),
        "pairs": sum(len(one) for one in hits.values()),
        "paradigms": accuracy,
    }


def read(folder: Path, limit: int | None) -> dict[str, list[tuple[str, str]]]:
    """Paradigm (file name without .jsonl) -> (good, bad) sentences."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"blimp: no *.jsonl in {folder}")
    if limit is not None and limit < 1:
        raise ValueError(f"blimp: limit must be at least 1; given: {limit}")
    paradigms = {}
    for file in files:
        pairs = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:limit], 1):
            entry = json.loads(line)
            missing = [field for field in ("sentence_good", "sentence_bad") if field not in entry]
            if missing:
                raise ValueError(f"blimp: {file}, line {number}: no {missing[0]}; there is {', '.join(entry)}")
            pairs.append((entry["sentence_good"], entry["sentence_bad"]))
        if not pairs:
            raise ValueError(f"blimp: {file} is empty")
        paradigms[file.stem] = pairs
    return paradigms
