"""Checkpoints compared: how far each is from the base, in which direction, and where their task vectors disagree.

Kinship of models is the correlation, the cosine or the distance of their task vectors ("Exploring Model Kinship for
Merging Large Language Models", Hu et al. 2024, arXiv:2410.12613).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion._kinship import warnings
from fusion._names import kind, split

if TYPE_CHECKING:
    from fusion.checkpoint import Source

CHUNK = 1 << 17  # elements of each model at once: they stay in a core's cache


@dataclass(frozen=True)
class Moments:
    """Sums over the entries of one tensor, or of several; d_1 ... d_K are the models minus the base."""

    gram: Tensor  # (K + 1, K + 1) float64 inner products of the base, d_1 ... d_K
    sums: Tensor  # (K,) float64 of d
    conflict: int  # entries where one d is above zero and another below
    numel: int

    def __add__(self, other: Moments) -> Moments:
        gram, sums = self.gram + other.gram, self.sums + other.sums
        return Moments(gram, sums, self.conflict + other.conflict, self.numel + other.numel)

    @classmethod
    def nothing(cls, k: int) -> Moments:
        return cls(torch.zeros(k + 1, k + 1, dtype=torch.float64), torch.zeros(k, dtype=torch.float64), 0, 0)

    @property
    def base(self) -> float:
        """The base's length."""
        return math.sqrt(max(float(self.gram[0, 0]), 0.0))

    @property
    def distances(self) -> list[float]:
        """|d_k|"""
        return self.gram.diagonal()[1:].clamp(min=0).sqrt().tolist()

    @property
    def cosines(self) -> Tensor:
        """(K, K) between task vectors; 0 where one is zero."""
        return _normalised(self.gram[1:, 1:])

    @property
    def correlations(self) -> Tensor:
        """(K, K) Pearson's: cosines around the mean of the entries."""
        return _normalised(self.gram[1:, 1:] - torch.outer(self.sums, self.sums) / max(self.numel, 1))

    @property
    def apart(self) -> Tensor:
        """(K, K) distances between the models."""
        squares = self.gram.diagonal()[1:]
        return (squares[:, None] + squares - 2 * self.gram[1:, 1:]).clamp(min=0).sqrt()

    @property
    def strangeness(self) -> list[float]:
        """Each model's distance from the base over that of a model of its size without any relation to the base: their
        directions would be at right angles, so that is the square root of |base|^2 + |model|^2."""
        base, squares = float(self.gram[0, 0]), self.gram.diagonal()[1:]
        models = base + squares + 2 * self.gram[0, 1:]
        return (squares / (base + models).clamp(min=1e-300)).clamp(min=0).sqrt().tolist()


def _normalised(products: Tensor) -> Tensor:
    lengths = products.diagonal().clamp(min=0).sqrt()
    return torch.where(lengths[:, None] * lengths > 0, products / (lengths[:, None] * lengths), 0.0).clamp(-1, 1)


@dataclass(frozen=True)
class Comparison:
    """What was read of K models and their base."""

    base: str
    models: tuple[str, ...]
    tensors: Mapping[str, Moments]
    left_out: Mapping[str, str]  # tensor -> why it was not compared

    def over(self, names: Iterable[str]) -> Moments:
        """Of these tensors together."""
        return sum((self.tensors[name] for name in names), Moments.nothing(len(self.models)))

    @property
    def layers(self) -> dict[str, Moments]:
        """By layer, the rest (embeddings, head, final norm) by its own name and before them."""
        places = {name: str(where[1]) if (where := split(name)) else kind(name) for name in self.tensors}
        order = sorted(dict.fromkeys(places.values()), key=lambda p: (p.isdigit(), int(p) if p.isdigit() else 0))
        return {place: self.over(name for name in places if places[name] == place) for place in order}

    @property
    def warnings(self) -> list[str]:
        """Sentences about models that are too far from the base to be its fine-tunes."""
        # Norms and biases of all models look alike: only matrices tell whether two of them are related.
        moments = self.over(self.large)
        return warnings(self.models, self.base, moments.strangeness, moments.distances)

    @property
    def large(self) -> set[str]:
        """Names of tensors that are not small: a hundredth of the largest or more."""
        largest = max((moments.numel for moments in self.tensors.values()), default=0)
        return {name for name, moments in self.tensors.items() if moments.numel * 100 >= largest}


def compare(
    base: Source, models: Mapping[str, Source], name: str, progress: Callable[[Sequence[str]], Any] = iter
) -> Comparison:
    """Every tensor of the base against the models' of that name, streamed in chunks; never a whole tensor in memory.

    progress: wraps the names of the tensors while they are read.  ValueError where no tensor can be compared.
    """
    left_out = _left_out(base, models)
    todo = [one for one in base.entries if one not in left_out]
    if not todo:
        one, why = next(iter(left_out.items()))
        raise ValueError(f"no tensor of {base.path} can be compared; {one}: {why}")
    found = {one: _moments(base, list(models.values()), one) for one in progress(todo)}
    return Comparison(name, tuple(models), found, left_out)


def _left_out(base: Source, models: Mapping[str, Source]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, model in models.items():
        for tensor, entry in base.entries.items():
            if tensor not in model.entries:
                found.setdefault(tensor, f"{name} has no such tensor")
            elif model.entries[tensor].shape != entry.shape:
                shapes = f"{list(model.entries[tensor].shape)} in {name}, {list(entry.shape)} in the base"
                found.setdefault(tensor, shapes)
            elif not (entry.dtype.is_floating_point and model.entries[tensor].dtype.is_floating_point):
                found.setdefault(tensor, "it holds no floating-point numbers")
            elif not entry.numel:
                found.setdefault(tensor, "it is empty")
        found |= {extra: f"only {name} has it" for extra in model.entries if extra not in base.entries}
    return found


def _moments(base: Source, models: Sequence[Source], name: str) -> Moments:
    from fusion.merge._x import gram, total

    numel = base.entries[name].numel
    step = min(CHUNK, numel)
    sources = [base, *models]
    buffers = [torch.empty(step, dtype=source.entries[name].dtype) for source in sources]
    values = torch.empty(len(sources), step)
    result = Moments.nothing(len(models))
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        for row, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            source.read(name, start, stop, buffer[: stop - start])
            values[row, : stop - start] = buffer[: stop - start]
        here = values[:, : stop - start]
        here[1:] -= here[0]
        low, high = here[1:].amin(0), here[1:].amax(0)
        result += Moments(gram(here), total(here[1:]), int(((low < 0) & (high > 0)).sum()), stop - start)
    if not torch.isfinite(result.gram).all():
        raise ValueError(f"{name} holds NaN or infinity in {', '.join(str(source.path) for source in sources)}")
    return result


def show(directories: Sequence[Path], base: Path | None) -> None:
    """Tables on the terminal: the directories against the base, the first of them where none is given."""
    from fusion import _table
    from fusion._progress import Progress
    from fusion.checkpoint import open_source

    origin, others = (directories[0], directories[1:]) if base is None else (base, directories)
    names = _names([origin, *others])
    root = open_source(origin)
    sources = {name: open_source(path, root) for name, path in zip(names[1:], others, strict=True)}
    console = _table._console()
    _tables(console, compare(root, sources, names[0], lambda todo: Progress(todo, "comparing tensors")))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return names


def _tables(console: Any, found: Comparison) -> None:
    from rich.markup import escape
    from rich.table import Table

    k = len(found.models)
    console.print(f"Task vectors: what separates a model from {escape(found.base)}")
    table = Table("layer")
    for name in found.models:
        table.add_column(f"{escape(name)}\nmoved", justify="right")
    if k > 1:
        table.add_column("cosine" if k == 2 else "mean\ncosine", justify="right")
        table.add_column("signs\nconflict", justify="right")
    rows = {**found.layers, "all": found.over(found.tensors)}
    for place, moments in rows.items():
        cells = [_percent(d / moments.base) if moments.base else "-" for d in moments.distances]
        if k > 1:
            pairs = moments.cosines[~torch.eye(k, dtype=torch.bool)]
            cells += [f"{float(pairs.mean()):+.3f}", _percent(moments.conflict / moments.numel)]
        table.add_row(escape(place), *cells, end_section=place == list(rows)[-2])
    console.print(table)
    console.print("moved: the length of the task vector, in percent of the base's; conflict: entries pulled both ways")
    if k > 1:
        _kinship(console, found)
    for sentence in found.warnings:
        console.print(f"[yellow]Beware:[/] {escape(sentence)}")
    if found.left_out:
        name, why = next(iter(found.left_out.items()))
        more = f" (and {len(found.left_out) - 1} more)" if len(found.left_out) > 1 else ""
        console.print(f"Not compared: {escape(name)}: {escape(why)}{more}")


def _kinship(console: Any, found: Comparison) -> None:
    from rich.markup import escape
    from rich.table import Table

    moments = found.over(found.tensors)
    console.print("\nKinship of the task vectors: correlation, cosine, distance")
    table = Table("")
    for name in found.models:
        table.add_column(escape(name), justify="right")
    for i, name in enumerate(found.models):
        cells = []
        for j in range(len(found.models)):
            pair = (moments.correlations[i, j], moments.cosines[i, j], moments.apart[i, j])
            cells.append("" if i == j else "{:+.3f}  {:+.3f}  {:.4g}".format(*map(float, pair)))
        table.add_row(escape(name), *cells)
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
