"""A plug-in step for the table of ideas: the teacher reads again up to every boundary that only the student has.

Where the student has a boundary inside a teacher's token the teacher has said nothing about what follows. Here it reads
the text cut off at that byte, tokenized afresh, and its prediction is recorded as a further row of the store: one
forward pass a boundary. (It then reads a last token that no training text ever ended with.)
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "targets"


def reread(job: "Job", *, out: str, teacher: str, model: str, data: str, draws: int = 16, batch: int = 64) -> None:
    """A store as of `record`, with rows at the boundaries of the tokenizer of `model` as well."""
    from fusion import _teacher
    from fusion.sources import load_tokenizer
    from fusion.steps.record import measures
    from fusion.targets import SHARD, Rule, Writer

    documents, directory = job.documents(data), job.model(teacher)
    rule = Rule.of(draws, None, None, 64)
    machine, _ = _teacher.load(
        directory, teacher, rule, max_length=None, batch_tokens=4096, dtype="float32", seed=job.seed, device=job.device
    )
    student = load_tokenizer(job.model(model))
    writer = Writer(job.directory, machine.header)
    shards = -(-len(documents) // SHARD)
    rows = tokens = 0
    for shard in job.progress(range(shards), f"{teacher} reads {data} again"):
        these = {
            d.digest: d for d in (documents[n] for n in range(shard * SHARD, min((shard + 1) * SHARD, len(documents))))
        }
        said = machine.targets(these)
        more = {}
        for digest, (found, content) in said.items():
            more[digest] = added(machine, these[digest], found, content, student, batch)
            rows, tokens = rows + len(more[digest][0].ids) - len(found.ids), tokens + len(found.ids)
        writer.write(shard, more)
    header = writer.finish(shards, directory)
    (job.directory / "metrics.json").write_text(json.dumps(measures(header) | {"read_again": rows / tokens}))


def added(machine: Any, document: Any, found: Any, content: np.ndarray, student: Any, batch: int) -> tuple[Any, Any]:
    """The document's targets with one more token, and row, at each of the student's own boundaries."""
    import torch

    from fusion.data import encode
    from fusion.targets import DocumentTargets, select, uniforms

    text = document.text.encode()
    ends = np.unique(encode(student, document).ends)
    ends = ends[(ends > 0) & (ends < len(text)) & ~np.isin(ends, found.ends)]
    whole = [b for b in ends.tolist() if b in _starts(document.text)]  # a prefix must be text
    entries = []
    salt = machine.salt ^ 0x5EED
    chance = uniforms(salt, document.digest, len(whole))
    for first in range(0, len(whole), batch):
        prefixes = [encode_prefix(machine.tokenizer, text[:b].decode()) for b in whole[first : first + batch]]
        width = max(map(len, prefixes))
        ids = torch.zeros(len(prefixes), width, dtype=torch.int64)
        for row, prefix in zip(ids, prefixes, strict=True):
            row[: len(prefix)] = torch.tensor(prefix)
        with torch.inference_mode():  # right padding is never looked at by what precedes it
            hidden = machine.decoder(input_ids=ids).last_hidden_state
            logits = machine.head(hidden[torch.arange(len(prefixes)), torch.tensor([len(p) - 1 for p in prefixes])])
            entries.append(select(logits, machine.header.rule, torch.from_numpy(chance[first : first + batch])))
    # A token that the teacher sees whole is cut in two: the first half keeps the row of the token, the second gets the
    # new one. Its own log-likelihood stays with the first half, so that bits per byte do not change.
    order = np.searchsorted(found.ends, whole, side="right")
    lengths = np.diff(found.offsets)
    columns: dict[str, list[Any]] = {n: [] for n in ("ids", "ends", "nll", "lengths", "tail", "content", "entries")}
    said = [
        (ids, logs, n, tail)
        for e in entries
        for ids, logs, n, tail in zip(
            torch.split(e.ids, e.lengths.tolist()), torch.split(e.log_probs, e.lengths.tolist()), e.lengths, e.tail
        )
    ]
    k = 0
    for t in range(len(found.ids)):
        span = slice(found.offsets[t], found.offsets[t + 1])
        row = (found.entry_ids[span], found.entry_log_probs[span], lengths[t], found.tail[t], found.nll[t])
        while k < len(whole) and order[k] == t:
            _push(columns, found.ids[t], whole[k], content[t], row)
            row = (said[k][0].numpy(), said[k][1].numpy(), int(said[k][2]), float(said[k][3]), np.float32("nan"))
            k += 1
        _push(columns, found.ids[t], found.ends[t], content[t], row)
    both = DocumentTargets(
        ids=np.asarray(columns["ids"]),
        ends=np.asarray(columns["ends"]),
        nll=np.asarray(columns["nll"], np.float32),
        offsets=np.concatenate([[0], np.cumsum(columns["lengths"])]).astype(np.int64),
        entry_ids=np.concatenate([e[0] for e in columns["entries"]]).astype(np.int64),
        entry_log_probs=np.concatenate([e[1] for e in columns["entries"]]).astype(np.float32),
        tail=np.asarray(columns["tail"], np.float32),
    )
    return both, np.asarray(columns["content"])


def _push(columns: dict[str, list[Any]], token: int, end: int, content: bool, row: tuple[Any, ...]) -> None:
    entry_ids, log_probs, length, tail, nll = row
    for name, value in zip(
        ("ids", "ends", "nll", "lengths", "tail", "content", "entries"),
        (token, end, nll, length, tail, content, (entry_ids, log_probs)),
        strict=True,
    ):
        columns[name].append(value)


def encode_prefix(tokenizer: Any, prefix: str) -> list[int]:
    """Ids of a text that goes on: no end token."""
    from fusion.data import Document, encode

    ids = encode(tokenizer, Document(prefix, "")).ids.tolist()
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _starts(text: str) -> set[int]:
    """Bytes at which a character begins."""
    found, at = {0}, 0
    for character in text:
        at += len(character.encode())
        found.add(at)
    return found
