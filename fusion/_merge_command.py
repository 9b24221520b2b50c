"""`fusion merge`: a merge from the command line, on one process or on the ranks of a launcher."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from fusion import _ranks
from fusion._adapter_files import is_adapter
from fusion._merge import merge_checkpoints
from fusion._progress import Progress
from fusion._say import duration, size
from fusion.recipe import ModelRef, scalar

PATIENCE = 2.0  # seconds without a bar


class Late:
    """A bar that shows itself when the work takes longer than one would notice."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.start = total, what, time.monotonic()
        self.done = 0
        self.bar: Progress[int] | None = None

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.advance(count)
        elif time.monotonic() - self.start > PATIENCE:
            self.bar = Progress(self.total, self.what)
            self.bar.advance(self.done)

    def __enter__(self) -> Late:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def run(
    method: str,
    models: Sequence[str],
    out: str,
    *,
    base: str | None,
    params: Sequence[str],
    post: Sequence[str],
    **options: Any,
) -> None:
    """Merges, and says what came out. options: those of `merge_checkpoints` that the command line gives as they are."""
    found, weights = parse_models(models)
    if base is None and all(is_adapter(Path(path)) for path in found.values()):
        _adapters(method, found, Path(out), weights, parse_params(params), post=post, **options)
        return
    with _launched(Path(out)) as ranks:
        merged = merge_checkpoints(
            method,
            {name: _located(path) for name, path in found.items()},
            out,
            base=None if base is None else _located(base),
            weights=weights,
            params=parse_params(params),
            post=[scalar(one) for one in post],
            rank=ranks.rank,
            world=ranks.world,
            wait=ranks.wait,
            progress=Late if ranks.rank == 0 else None,
            **options,
        )
    if ranks.rank == 0:
        print(_told(out, merged.metrics), flush=True)


def _adapters(
    method: str,
    adapters: Mapping[str, str],
    out: Path,
    weights: Sequence[float] | None,
    params: dict[str, Any],
    *,
    seed: int,
    **given: Any,
) -> None:
    """Adapters alone become an adapter; `--param rank=8` is its rank."""
    from fusion._adapter_merge import merge_adapters
    from fusion._merge_check import PASSED

    for name in PASSED:
        if given.get(name):
            raise ValueError(f"--{name}: adapters merge into an adapter, and '{name}' has nothing to say to that")
    rank = params.pop("rank", None)
    directories = {name: Path(path) for name, path in adapters.items()}
    merge_adapters(method, directories, out, weights=weights, rank=rank, params=params, seed=seed)
    print(f"{out}: an adapter of {len(adapters)}", flush=True)


def parse_models(models: Sequence[str]) -> tuple[dict[str, str], list[float] | None]:
    """{name: directory} and the weights of DIR or DIR:WEIGHT: 1 where none is given, None when none is at all."""
    found: dict[str, str] = {}
    weights: list[float | None] = []
    for given in models:
        path, colon, last = given.rpartition(":")
        weight = scalar(last) if colon and not Path(given).exists() else None
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            path, weight = given, None
        name = Path(path).name or path
        count = sum(one == name or one.startswith(f"{name}_") for one in found)
        found[f"{name}_{count + 1}" if name in found else name] = path
        weights.append(weight)
    given_weights = [1.0 if one is None else float(one) for one in weights]
    return found, None if all(one is None for one in weights) else given_weights


def parse_params(params: Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE, the value as a recipe would have it."""
    found = {}
    for given in params:
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise ValueError(f"--param {given}: NAME=VALUE is needed, like density=0.5")
        found[name] = scalar(value)
    return found


def _located(path: str) -> Path:
    """A directory; of a .gguf file its conversion."""
    if not path.endswith(".gguf"):
        return Path(path)
    from fusion import _keys, sources

    return sources.resolve(path, ModelRef(path, path=path), _keys.cache_directory(), Path.cwd(), lambda _: [])


@contextmanager
def _launched(out: Path) -> Iterator[_ranks.Ranks]:
    """The ranks of torchrun, accelerate or another launcher; whichever fails first speaks, and the others end."""
    ranks = _ranks.of_environment(os.environ)
    if ranks.world == 1:
        yield ranks
        return
    ranks = _ranks.join(out.absolute().parent, os.environ)
    try:
        yield ranks
    except _ranks.Stopped:
        sys.exit(1)
    except BaseException:
        if not ranks.fail():
            sys.exit(1)
        raise
    ranks.leave()


def _told(out: str, metrics: Mapping[str, Any]) -> str:
    actions = [entry["action"] for entry in metrics["tensors"]]
    counts = ", ".join(f"{actions.count(one)} {one}" for one in ("merged", "equal", "copied") if one in actions)
    return (
        f"{out}: {len(actions)} tensors ({counts}), {size(metrics['bytes_written'])} in "
        f"{duration(metrics['seconds'])}, peak memory {size(metrics['peak_rss'])}"
    )
