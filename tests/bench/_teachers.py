"""What the benchmarks of the store share: real teachers, real text, and a shard's worth of documents."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion import data
from fusion.recipe import DataRef

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"


def model(name: str) -> Path:
    """The directory of a real model; ends the benchmark with a sentence when FUSION_MODELS has none."""
    folder = Path(os.environ.get("FUSION_MODELS", "")) / name
    if not (folder / "config.json").exists():
        sys.exit(
            f"set FUSION_MODELS to a folder that holds {name}/ with config.json, model.safetensors, tokenizer.json"
        )
    return folder


def documents(count: int, files: Sequence[str]) -> dict[str, data.Document]:
    """`count` pieces of at most 2 KiB, evenly from the middle of each text (all of ../shared/data/text, or the standard
    library where there is none), by digest."""
    paths = [Path(file) for file in files] or sorted(SHARED.glob("*.txt"))
    texts = [str(path) for path in paths] or [data.STDLIB]
    chosen: list[data.Document] = []
    for n, path in enumerate(texts):
        ref = DataRef(name="text", path=path, format="text")
        held = data.documents(ref, Path(), {})
        share = count * (n + 1) // len(texts) - count * n // len(texts)
        chosen += [held[len(held) // 2 + i] for i in range(share)]
    return {document.digest: document for document in chosen}
