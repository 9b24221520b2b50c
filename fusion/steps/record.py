"""What a teacher says about a text, written down once: a store of targets that every student and fusion rule can use.

The default keeps 16 random draws of each prediction (Anshumann et al. 2025, arXiv:2503.16870).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion.targets import SHARD, Header, Rule, Writer

if TYPE_CHECKING:
    from fusion._progress import Progress
    from fusion._teacher import Teacher
    from fusion.data import Document
    from fusion.job import Job
    from fusion.plan import View

OUTPUT = "targets"
# For the estimate of disk space: a little above what real text takes (docs/target_store.md has the measured figures).
BYTES_PER_ENTRY = 2.8
BYTES_PER_TOKEN = 6.0
DISTINCT = 0.7  # share of draws that are of a token of their own
SAMPLE = 32  # documents that are tokenized for it


def check(view: View) -> None:
    """Raises ValueError for a rule that can't be followed; `plan` calls it."""
    fields = view.fields
    Rule.of(fields["draws"], fields["top_k"], fields["nucleus"], fields["cap"])
    for name in ("max_length", "batch_tokens"):
        if fields[name] is not None and fields[name] < 2:
            raise ValueError(f"{view.place}: {name} is {fields[name]}; a prediction needs at least 2 tokens")


def record(
    job: Job,
    *,
    out: str,
    teacher: str,
    data: str,
    draws: int | None = None,
    top_k: int | None = None,
    nucleus: float | None = None,
    cap: int = 64,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    dtype: str = "float32",
) -> None:
    """Runs `teacher` over `data` and keeps its predictions: `draws` random tokens each (16 when nothing is said), or
    the `top_k` most likely, or the `nucleus` of that much mass with at most `cap` tokens.

    Documents longer than `max_length` tokens (1024, or what the teacher can read if that is less) are recorded in
    consecutive windows. Raises ValueError for two rules at once, a disk too small, a head smaller than the vocabulary,
    and NaN or infinite logits, naming document and row.
    """
    from fusion import _teacher

    rule = Rule.of(draws, top_k, nucleus, cap)
    documents = job.documents(data)
    directory = job.model(teacher)
    machine, sentence = _teacher.load(
        directory,
        teacher,
        rule,
        max_length=max_length,
        batch_tokens=batch_tokens,
        dtype=dtype,
        seed=job.seed,
        device=job.device,
    )
    if sentence is not None and job.rank == 0:
        print(sentence, flush=True)
    writer = Writer(job.directory, machine.header)
    held = sum(file.stat().st_size for file in job.directory.glob("[0-9]*"))  # of a run that was stopped
    need, free = estimate(machine, documents) - held, shutil.disk_usage(job.directory).free
    if need > free:
        raise ValueError(
            f"recording {len(documents)} documents of {data} takes about {need / 1e9:.3g} GB and {job.directory} has "
            f"{free / 1e9:.3g} GB free; take fewer documents or keep less of each prediction"
        )
    shards = -(-len(documents) // SHARD)
    mine = range(job.rank, shards, job.world)
    total = sum(min(SHARD, len(documents) - shard * SHARD) for shard in mine)
    tokens, seconds = 0, 0.0
    progress: Progress[int] = job.progress(total, f"recording {teacher} on {data}")
    with progress as bar:
        for shard in mine:
            these = [documents[n] for n in range(shard * SHARD, min((shard + 1) * SHARD, len(documents)))]
            if writer.complete(shard, [document.digest for document in these]):
                bar.advance(len(these))
                continue
            start = time.perf_counter()
            distinct = {document.digest: document for document in these}
            said = machine.targets(distinct, bar.advance)
            writer.write(shard, {digest: said[digest] for digest in distinct})
            bar.advance(len(these) - len(distinct))
            tokens += sum(len(one.ids) for one, _ in said.values())
            seconds += time.perf_counter() - start
    if job.rank == 0:
        job.wait(lambda: all(writer.has(shard) for shard in range(shards)), "the other ranks' shards of targets")
        header = writer.finish(shards, directory)
        metrics = measures(header) | ({"tokens_per_second": tokens / seconds} if seconds else {})  # of this rank
        job.measured(metrics)
        job.log(**metrics)


def measures(header: Header) -> dict[str, float]:
    """What the report says about a store."""
    return {
        "documents": header.documents,
        "tokens": header.tokens,
        "bytes": header.bytes,
        "bytes_per_token": header.bytes_per_token,
        "bits_per_byte": header.bits_per_byte,
        "entries_per_row": header.entries / max(header.rows, 1),
        "rows_with_entries": header.rows / max(header.tokens, 1),
    }


def estimate(teacher: Teacher, documents: Sequence[Document]) -> float:
    """Bytes that the targets of these documents will take, from the token counts of a few of them."""
    every = max(1, len(documents) // SAMPLE)
    some = range(0, len(documents), every)
    tokens = sum(len(teacher.encode(documents[n]).ids) for n in some) * len(documents) / max(len(some), 1)
    rule = teacher.header.rule
    entries = rule.most(teacher.header.vocabulary) * (DISTINCT if rule.draws else 1)
    return tokens * (BYTES_PER_TOKEN + BYTES_PER_ENTRY * entries)
