"""`fusion merge`: a merge from the command line, on one process or on the ranks of a launcher."""

from __future__ import annotations

import os
import re
import shlex
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
from fusion._merge_card import merge_card
from fusion._progress import Progress
from fusion._say import duration, size
from fusion.recipe import ModelRef, scalar

HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
PATIENCE = 2.0  # seconds without a bar
CHANGE_BYTES = ("only", "copy", "dtype", "tokenizer", "seed")  # of the options


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
    given, after = parse_params(params), [scalar(one) for one in post]
    _refuse_device(options["device"])
    said = {"params": given, "post": after, **{name: options[name] for name in CHANGE_BYTES}}
    typed = _typed(method, {"base": base, "model": models, "out": out, "param": params, "post": post, **options})
    readme = Path(out) / "README.md"
    if base is None and all(is_adapter(Path(path)) for path in found.values()):
        _adapters(method, found, Path(out), weights, dict(given), post=post, **options)
        card = merge_card(readme.parent, method, found, base, weights, said, typed, adapters=True)
        readme.write_text(card, encoding="utf-8")
        return
    with _launched(Path(out)) as ranks:
        merged = merge_checkpoints(
            method,
            {name: _located(path) for name, path in found.items()},
            out,
            base=None if base is None else _located(base),
            weights=weights,
            params=given,
            post=after,
            rank=ranks.rank,
            world=ranks.world,
            wait=ranks.wait,
            progress=Late if ranks.rank == 0 else None,
            **options,
        )
    if ranks.rank == 0:
        from fusion._merge_report import of_metrics

        named = None if base is None else Path(base).name
        sentences = of_metrics(merged.metrics, merged.path.name, named, merged.path).sentences
        card = merge_card(readme.parent, method, found, base, weights, said, typed, sentences=sentences)
        readme.write_text(card, encoding="utf-8")
        print(_told(out, merged.metrics), *sentences, sep="\n", flush=True)


def _refuse_device(device: str) -> None:
    """ValueError for one that is not there, before anything is read."""
    if device == "cpu":
        return
    import torch

    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    allowed = [] if here is None else [f"{here.type}:{n}" for n in range(torch.accelerator.device_count())]
    if device not in [*allowed, *(one.partition(":")[0] for one in allowed)]:
        raise ValueError(f"--device {device}: there is none such here; allowed: {', '.join(['cpu', *allowed])}")


def _typed(method: str, given: Mapping[str, Any]) -> str:
    """The command, as it can be typed again."""
    words = ["fusion", "merge", method]
    for name, value in given.items():
        several = value if isinstance(value, list | tuple) else [] if value is None else [value]
        words += [word for one in several for word in (f"--{name.replace('_', '-')}", str(one))]
    return shlex.join(words)


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
        if name in found:
            raise ValueError(f"--param {given}: '{name}' is given twice; for a value for each model give a list")
        found[name] = scalar(value)
    return found


def _located(path: str) -> Path:
    """A directory; of a .gguf file its conversion."""
    if not path.endswith(".gguf"):
        if not Path(path).exists() and HUB.fullmatch(path):
            raise ValueError(f"there is no directory {path}; what lies on the hub goes into a recipe: {{hub: {path}}}")
        return Path(path)
    from fusion import _keys, sources

    ref = ModelRef(path, path=path, place=Path(path).name)
    return sources.resolve(path, ref, _keys.cache_directory(), Path.cwd(), lambda _: [])


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
