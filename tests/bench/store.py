"""Bytes a token of the store on real text, its error, and the same information as Arrow lists. Exits with 1 on a miss.

FUSION_MODELS=... python -m tests.bench.store [--documents 15] [FILE ...]
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusion import _teacher
from fusion.targets import DocumentTargets, Rule, Store, Writer
from tests.bench._teachers import documents, model

# teacher, rule, bytes a token at most (None: no limit is set, shown beside the others)
CASES = [
    ("smollm2", Rule(draws=16), 24),
    ("smollm2", Rule(top_k=10), 36),
    ("smollm2", Rule(top_k=50), 160),
    ("smollm2", Rule(nucleus=0.98, cap=64), None),
    ("gemma3", Rule(draws=16), None),
    ("gemma3", Rule(top_k=10), 36),
    ("gemma3", Rule(top_k=50), 160),
]
NATS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=15)
    parser.add_argument("files", nargs="*")
    given = parser.parse_args()
    texts = documents(given.documents, given.files)
    print(
        "| teacher (vocabulary) | rule | tokens | entries/row | store B/token | limit | Arrow lists | Parquet zstd | "
        "error, nats | read us/token |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    loaded: dict[str, _teacher.Teacher] = {}
    missed = []
    for name, rule, limit in CASES:
        if name not in loaded:
            options = {"max_length": None, "batch_tokens": 2048, "dtype": "float32", "seed": 0, "device": "cpu"}
            loaded = {name: _teacher.load(model(name), name, rule, **options)[0]}  # one at a time
        teacher = replace(loaded[name], header=replace(loaded[name].header, rule=rule))
        said = teacher.targets(texts)
        with tempfile.TemporaryDirectory() as folder:
            writer = Writer(Path(folder) / "store", teacher.header)
            writer.write(0, said)
            header = writer.finish(1, Path(folder))
            size = header.bytes + (Path(folder) / "store" / "store.json").stat().st_size
            store = Store.open(Path(folder) / "store")
            store[next(iter(said))]  # maps the file
            start = time.perf_counter()
            read = {digest: store[digest] for digest in said}
            seconds = time.perf_counter() - start
            error = max(worst(read[digest], one) for digest, (one, _) in said.items())
            arrow, parquet = as_lists([one for one, _ in said.values()], Path(folder))
        mean = size / header.tokens
        what = f"{rule.draws} draws" if rule.draws else f"k = {rule.top_k}" if rule.top_k else f"nucleus {rule.nucleus}"
        print(
            f"| {name} ({header.vocabulary}) | {what} | {header.tokens} | {header.entries / header.rows:.1f} | "
            f"{mean:.1f} | {limit or '-'} | {arrow / header.tokens:.0f} | {parquet / header.tokens:.0f} | "
            f"{error:.4f} | {1e6 * seconds / header.tokens:.1f} |",
            flush=True,
        )
        if (limit is not None and mean > limit) or error > NATS:
            missed.append(
                f"{name}, {what}: {mean:.1f} bytes a token (at most {limit}), error {error:.4f} (at most {NATS})"
            )
    if missed:
        sys.exit("missed: " + "; ".join(missed))


def worst(read: DocumentTargets, said: DocumentTargets) -> float:
    """The largest error of a log-probability; ids must be the same."""
    owner = np.repeat(np.arange(len(said.ids)), np.diff(said.offsets))
    order = np.lexsort((said.entry_ids, -said.entry_log_probs, owner))
    assert (read.entry_ids == said.entry_ids[order]).all() and (read.offsets == said.offsets).all()
    assert (read.ids == said.ids).all() and (read.ends == said.ends).all()
    tailed = np.isfinite(said.tail)
    entries = np.abs(read.entry_log_probs - said.entry_log_probs[order]).max(initial=0)
    return float(max(entries, np.abs(read.tail[tailed] - said.tail[tailed]).max(initial=0)))


def as_lists(said: list[DocumentTargets], folder: Path) -> tuple[int, int]:
    """Sizes of the files that `datasets` writes for the same information as lists: Arrow and Parquet."""
    import datasets
    from pyarrow import parquet

    datasets.disable_progress_bars()
    rows = []
    for one in said:
        cuts = one.offsets[1:-1]
        rows.append(
            {
                "ids": one.ids.tolist(),
                "ends": one.ends.tolist(),
                "nll": one.nll.astype(float).tolist(),
                "tail": one.tail.astype(float).tolist(),
                "entry_ids": [part.tolist() for part in np.split(one.entry_ids, cuts)],
                "entry_log_probs": [part.astype(float).tolist() for part in np.split(one.entry_log_probs, cuts)],
            }
        )
    table = datasets.Dataset.from_list(rows)
    assert table.features["entry_ids"].feature.feature.dtype == "int64"
    table.save_to_disk(folder / "arrow")
    parquet.write_table(table.data.table, folder / "lists.parquet", compression="zstd")
    arrow = sum(file.stat().st_size for file in (folder / "arrow").glob("*.arrow"))
    return arrow, (folder / "lists.parquet").stat().st_size


if __name__ == "__main__":
    main()
