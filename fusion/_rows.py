"""Rows of preference data: a `data:` entry with `column: "*"`, as TRL's trainers take them."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion import data
from fusion._cut import parse_split, shuffled
from fusion._say import nearest

if TYPE_CHECKING:
    from fusion.job import Job
    from fusion.recipe import DataRef

# Sets of columns of which one has to be there, by algorithm: TRL's dataset formats. A prompt may also be the beginning
# that two conversations share.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dpo": (("chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "reward": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
}


def check_columns(algorithm: str, known: Iterable[str], place: str) -> None:
    """ValueError when the columns are none that the algorithm learns from."""
    known = list(known)
    wanted = COLUMNS[algorithm]
    if any(set(columns) <= set(known) for columns in wanted):
        return
    missing = min(([c for c in columns if c not in known] for columns in wanted), key=len)
    raise ValueError(
        f"{place}: {algorithm} learns from the columns {' or from '.join(', '.join(one) for one in wanted)}; there is "
        f"no '{missing[0]}' among {', '.join(known)}{nearest(missing[0], known)}"
    )


def rows(ref: "DataRef", base: Path) -> Any:
    """A datasets.Dataset with all columns, in the order and of the part that the entry says."""
    import numpy as np

    if ref.mix or ref.format == "text":
        raise ValueError(
            f"{ref.place}: rows of preferences are a json or parquet file, or on the hub, with column: '*'"
        )
    table, sliced = data.columns_of(ref, base)
    order = np.arange(len(table), dtype=np.int64).reshape(-1, 1).repeat(3, axis=1)
    kept = shuffled(order, ref.shuffle)[parse_split(sliced, len(order), ref.place)][:, 0]
    if not len(kept):
        raise ValueError(f"{ref.place}: no row in it (split {ref.split!r} of {ref.path or ref.hub})")
    return table if ref.shuffle is None and len(kept) == len(table) else table.select(kept)


def shared(job: "Job", name: str, algorithm: str) -> Any:
    """The rows in a directory that all ranks see: what TRL computes for each of them lies beside them, for all."""
    import datasets

    folder = job.directory / "rows"
    if job.rank == 0 and not folder.exists():
        found = rows(job.data(name), job.recipe.base)
        check_columns(algorithm, found.column_names, job.data(name).place)
        begun = folder.with_name("rows.new")
        shutil.rmtree(begun, ignore_errors=True)  # a killed run's
        found.save_to_disk(str(begun))
        os.rename(begun, folder)
    job.wait(folder.exists, "rank 0 to write the rows")
    datasets.disable_progress_bars()
    return datasets.load_from_disk(str(folder))


def texts(row: Mapping[str, Any], algorithm: str) -> Iterator[Any]:
    """What of a row becomes one sequence each: texts, or conversations."""
    prompt = row.get("prompt")
    if algorithm in ("grpo", "rloo"):
        yield prompt
        return
    for column in ("chosen", "rejected") if "chosen" in row else ("completion",):
        yield row[column] if prompt is None else prompt + row[column]


def tokens(tokenizer: Any, text: Any) -> int:
    """Tokens of a text, or of a conversation under the model's own template."""
    if isinstance(text, str):
        return len(tokenizer(text)["input_ids"])
    return len(tokenizer.apply_chat_template(text, tokenize=True, return_dict=True)["input_ids"])
