"""Tokens a second of recording against a bare forward loop over the same batches. Exits with 1 below 0.85.

The bare loop calls `model(**inputs)`, which computes all logits, and does nothing with them. Recording is all of it:
tokenizing, batching, drawing, packing, writing and flushing the shard. Both take turns in one process, and the ratio is
the median over the pairs, since a machine's speed drifts more than they differ.

    FUSION_MODELS=... python -m tests.bench.record [--documents 10] [--pairs 5] [--teacher smollm2] [FILE ...]
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fusion import _teacher
from fusion.sources import load_model
from fusion.targets import Rule, Writer
from tests.bench._teachers import documents, model

LEAST = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("files", nargs="*")
    given = parser.parse_args()
    texts = documents(given.documents, given.files)
    folder = model(given.teacher)
    options = {"max_length": None, "batch_tokens": given.batch_tokens, "dtype": "float32", "seed": 0, "device": "cpu"}
    plain = load_model(folder)
    print("| rule | tokens | bare tokens/s | record tokens/s | ratio (median of pairs) | range | CPU time ratio |")
    print("|---|---|---|---|---|---|---|")
    slow = []
    first, _ = _teacher.load(folder, given.teacher, Rule(draws=16), **options)
    for rule in (Rule(draws=16), Rule(top_k=10), Rule(top_k=50)):
        teacher = replace(first, header=replace(first.header, rule=rule))
        tokens = sum(len(teacher.encode(document).ids) for document in texts.values())
        batches = teacher.batches(texts)
        times: list[tuple[float, float, float, float]] = []
        with tempfile.TemporaryDirectory() as place:
            writer = Writer(Path(place), teacher.header)
            for pair in range(given.pairs):
                start, cpu = time.perf_counter(), time.process_time()
                with torch.inference_mode():
                    for batch in batches:
                        plain(**batch.inputs)
                middle, cpu_middle = time.perf_counter(), time.process_time()
                writer.write(pair, teacher.targets(texts))
                end, cpu_end = time.perf_counter(), time.process_time()
                times.append((middle - start, end - middle, cpu_middle - cpu, cpu_end - cpu_middle))
        ratios = [bare / record for bare, record, _, _ in times]
        ratio = statistics.median(ratios)
        cpu_ratio = statistics.median(bare / record for _, _, bare, record in times)
        bare, record = (tokens / statistics.median(one[n] for one in times) for n in (0, 1))
        what = f"{rule.draws} draws" if rule.draws else f"k = {rule.top_k}"
        print(
            f"| {what} | {tokens} | {bare:.0f} | {record:.0f} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
            f"{cpu_ratio:.3f} |",
            flush=True,
        )
        if ratio < LEAST:
            slow.append(f"{what}: {ratio:.3f}")
    if slow:
        sys.exit(f"below {LEAST}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
