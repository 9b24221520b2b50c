"""A model under another vocabulary, so that models of different tokenizers can be merged."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fusion._progress import Progress
    from fusion.job import Job

OUTPUT = "model"
BUILDS = False


def retokenize(
    job: Job,
    *,
    out: str,
    model: str,
    vocabulary: Literal["base", "union", "model"] = "base",
    base: str | None = None,
    models: str | list[str] | None = None,
    missing: Literal["first_piece", "omp", "mean", "zero"] = "first_piece",
    k: int = 64,
    pad_to_multiple_of: int = 1,
    shard_size: str = "5GB",
) -> None:
    """The model with the tokenizer of `base`, with that of the union of `base` and `models` (`model`, when none are
    named), or with its own and no padding; rows of tokens that it has are kept to the bit."""
    if job.rank != 0:
        return
    from fusion._new_rows import new_rows
    from fusion._retokenize import Stored, rewritten, write
    from fusion._vocabulary import Spoken, Vocabulary, write_files

    own = Stored.open(job.model(model))
    names = names_of(vocabulary, model, base, models)
    words = Vocabulary.of(names, model, lambda name: Spoken.open(job.model(name)))
    if len(words.given_up) > own.rows:
        raise ValueError(
            f"{job.place}.model: the tokenizer of {model} has {len(words.given_up)} tokens, but its embedding only "
            f"{own.rows} rows"
        )
    sides = len(dict.fromkeys(own.tables.values())) if missing == "omp" else 0
    found: Progress[int] = job.progress(sides * len(words.lacking), f"{model}: {len(words.lacking)} missing tokens")
    begun = job.directory / "omp"
    with found as bar:
        rows = new_rows(
            missing, own, words, lambda name: Stored.open(job.model(name)), k, begun, bar.advance, job.device
        )
    count = -(-len(words.kept) // pad_to_multiple_of) * pad_to_multiple_of
    new = {name: rewritten(own.tensor(name), rows, side, count) for name, side in own.tables.items()}
    written: Progress[int] = job.progress(len(own.header.tensors), f"{out}: tensors")
    with written as bar:
        write(own, new, count, job.directory, shard_size, bar.advance)
    shutil.rmtree(begun, ignore_errors=True)
    write_files(words, own.directory, own.rows, count, job.directory)
    metrics = {
        "tokens": len(words.kept),
        "rows": count,
        "kept": int((words.kept >= 0).sum()),
        "made": len(words.lacking),
        "given_up": int((words.given_up < 0).sum()),
        "left_out": words.left_out,
    }
    job.measured(metrics)


def names_of(vocabulary: str, model: str, base: str | None, models: str | list[str] | None) -> list[str]:
    """The models whose tokenizers make the new one, the leading one first."""
    if vocabulary == "model" or base is None:
        return [model]
    others = [] if vocabulary == "base" else [models] if isinstance(models, str) else models or [model]
    return list(dict.fromkeys([base, *others]))


def check(view: Any) -> None:
    """For planning: fields that go together, and a checkpoint whose tensors are understood."""
    from fusion import _keys, sources
    from fusion._retokenize import token_tables
    from fusion._say import bytes_of

    fields = view.fields
    if fields["vocabulary"] == "model":
        extra = next((name for name in ("base", "models") if fields[name] is not None), None)
        if extra is not None:
            raise ValueError(
                f"{view.place}.{extra}: vocabulary: model keeps the model's own tokenizer and reads no other"
            )
    elif fields["base"] is None:
        raise ValueError(
            f"{view.place}: vocabulary: {fields['vocabulary']} needs base, the model whose tokenizer leads"
        )
    elif fields["vocabulary"] == "base" and fields["models"] is not None:
        raise ValueError(
            f"{view.place}.models: vocabulary: base takes one tokenizer; several go with vocabulary: union"
        )
    for name in ("k", "pad_to_multiple_of"):
        if fields[name] < 1:
            raise ValueError(f"{view.place}.{name}: it is {fields[name]} and must be at least 1")
    bytes_of(fields["shard_size"], f"{view.place}.shard_size")
    name = fields["model"]
    if view.kinds.get(name) == "directory":
        token_tables(sources.header(_keys.model_directory(view.recipe, name)), f"{view.place}.model")
