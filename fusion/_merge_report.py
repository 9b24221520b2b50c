"""What a merge step left in metrics.json: how far everything moved, where the models disagree, what each one kept."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion import _pictures as draw
from fusion._kinship import OUTLIER, STRANGE, warnings
from fusion._readings import is_number, numbers_of, optional_json
from fusion.recipe import Step

DIVIDES = ("karcher", "multislerp", "nuslerp")  # methods whose result is as long as its inputs by themselves


@dataclass(frozen=True)
class Part:
    """One tensor of a merge, as metrics.json has it; None where nothing was read."""

    name: str
    layer: int | None
    kind: str
    action: str
    numel: int
    norms: tuple[float, ...] | None  # (K,) of the task vectors
    cosines: tuple[tuple[float, ...], ...] | None  # (K, K)
    moved: float | None
    base_norm: float | None
    conflict: float | None
    kept: tuple[float, ...] | None  # (K,) shares


@dataclass(frozen=True)
class Merge:
    """One merge step."""

    name: str
    method: str | None
    params: Mapping[str, Any]
    models: tuple[str, ...]
    weights: tuple[float, ...] | None
    base: str | None
    numbers: Mapping[str, float]  # seconds, bytes_read, bytes_written, peak_rss
    parts: tuple[Part, ...]

    @property
    def lengths(self) -> list[float] | None:
        """(K,) lengths of the task vectors over all tensors."""
        norms = [part.norms for part in self.parts if part.norms]
        return [math.hypot(*(one[k] for one in norms)) for k in range(len(self.models))] if norms else None

    @property
    def base_length(self) -> float:
        """Of the base (without one, of the models' mean), over the same tensors."""
        return math.hypot(*(part.base_norm or 0.0 for part in self.parts if part.norms))

    @property
    def cosines(self) -> list[list[float]] | None:
        """(K, K) between whole task vectors, from those of the tensors."""
        lengths, k = self.lengths, len(self.models)
        if lengths is None:
            return None
        products = [[0.0] * k for _ in range(k)]
        for part in self.parts:
            if part.norms and part.cosines:
                for i in range(k):
                    for j in range(k):
                        products[i][j] += part.cosines[i][j] * part.norms[i] * part.norms[j]
        return [
            [products[i][j] / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else 0.0 for j in range(k)]
            for i in range(k)
        ]

    @property
    def conflict(self) -> float | None:
        """Share of entries that are pulled both ways."""
        return average((part.conflict, part.numel) for part in self.parts)

    @property
    def moved(self) -> float | None:
        """How far the result is from the base, as a share of the base's length."""
        found = [part.moved for part in self.parts if part.moved is not None]
        return math.hypot(*found) / self.base_length if found and self.base_length else None

    @property
    def kept(self) -> list[float] | None:
        """(K,) share of each model's entries that the method kept."""
        known = [(part.kept, part.numel) for part in self.parts if part.kept]
        total = sum(numel for _, numel in known)
        return (
            [sum(kept[k] * numel for kept, numel in known) / total for k in range(len(self.models))] if total else None
        )

    @property
    def divides(self) -> bool:
        """Whether the method makes the weights add up to 1 by itself."""
        return self.method in DIVIDES or (self.method == "linear" and bool(self.params.get("normalize", True)))

    @property
    def sentences(self) -> list[str]:
        """What a reader should know before anything else: odd weights, models that do not belong together, outliers."""
        return [*weight_sentences(self), *_strangers(self), *_outliers(self)]


def read_merge(step: Step, directory: Path) -> Merge | None:
    """A merge step's metrics.json; None where it left none. ValueError names what is malformed."""
    path = directory / "metrics.json"
    found = optional_json(path)
    if not isinstance(found.get("tensors"), list) or not isinstance(found.get("models"), list):
        return None
    base = None if found.get("base") is None else str(step.fields.get("base") or Path(str(found["base"])).name)
    return of_metrics(found, step.out, base, path)


def of_metrics(found: Mapping[str, Any], name: str, base: str | None, path: Path) -> Merge:
    """The merge called `name` that metrics tell of; `path` is where they lie, or where the merge does."""
    models = tuple(map(str, found["models"]))
    weights = found.get("weights")
    return Merge(
        name,
        found.get("method"),
        found.get("params") or {},
        models,
        None if weights is None else tuple(map(float, weights)),
        base,
        numbers_of({name: found.get(name) for name in ("seconds", "bytes_read", "bytes_written", "peak_rss")}),
        tuple(_part(entry, len(models), path) for entry in found["tensors"]),
    )


def _part(entry: Any, k: int, path: Path) -> Part:
    missing = [name for name in ("name", "kind", "action", "numel") if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"{path}: an entry of tensors has no {missing[0]}: {entry!r:.80}")

    def numbers(value: Any) -> tuple[float, ...] | None:
        return tuple(map(float, value)) if isinstance(value, list) and all(map(is_number, value)) else None

    def number(value: Any) -> float | None:
        return float(value) if is_number(value) else None

    norms, kept = numbers(entry.get("norms")), numbers(entry.get("kept"))
    rows = [numbers(row) or () for row in entry.get("cosines") or ()]
    for name, found in (("norms", norms), ("kept", kept), ("cosines", rows)):
        if found and len(found) != k:
            raise ValueError(f"{path}: {entry['name']} has {len(found)} {name} for {k} models")
    return Part(
        str(entry["name"]),
        entry.get("layer"),
        str(entry["kind"]),
        str(entry["action"]),
        int(entry["numel"]),
        norms,
        tuple(rows) or None,
        number(entry.get("moved")),
        number(entry.get("base_norm")),
        number(entry.get("conflict")),
        kept,
    )


def average(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of (value, weight) pairs over the values that are known; None without any."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def weight_sentences(merge: Merge) -> list[str]:
    """Nothing where the weights add up to 1."""
    if merge.weights is None or abs(sum(merge.weights) - 1) < 1e-6:
        return []
    total = f"The weights add up to {draw.short(sum(merge.weights))}, not to 1"
    if merge.divides:
        return [f"{total}; {merge.method} divides by their sum, so that only their ratios count."]
    if merge.base is not None:
        return [
            f"{total}. Around a base that is allowed: a weight scales a task vector, and 1 for each is plain task "
            "arithmetic."
        ]
    return [
        f"{total}, and there is no base: weights of whole models that do not add up to 1 make every number of the "
        "result too large or too small, unless the method divides by their sum."
    ]


def _strangers(merge: Merge) -> list[str]:
    """From large tensors alone: norms and biases of all models look alike."""
    largest = max((part.numel for part in merge.parts), default=0)
    large = [part for part in merge.parts if part.norms and part.numel * 100 >= largest]
    base = math.hypot(*(part.base_norm or 0.0 for part in large))
    if not large or not base:
        return []
    lengths = [math.hypot(*(part.norms[k] for part in large if part.norms)) for k in range(len(merge.models))]
    if merge.base is not None:  # a model without relation to the base, and of its size, would be this far from it
        return warnings(merge.models, merge.base, [length / (base * math.sqrt(2)) for length in lengths], lengths)
    k = len(merge.models)
    apart = [length / (base * math.sqrt(k - 1)) for length in lengths] if k > 1 else []
    if apart and min(apart) > STRANGE:
        return [
            "The models have nothing to do with one another: their directions are at right angles, and a mean of such "
            "models is none. Align them first, or give the base that they share."
        ]
    return []


def _outliers(merge: Merge) -> list[str]:
    shares = {part.name: part.moved / part.base_norm for part in merge.parts if part.moved and part.base_norm}
    if len(shares) < 8:
        return []
    middle = sorted(shares.values())[len(shares) // 2]
    far = sorted((name for name in shares if shares[name] > OUTLIER * middle), key=lambda name: -shares[name])
    if not far:
        return []
    named = ", ".join(f"{name} ({percent(shares[name])})" for name in far[:3])
    more = f" and {len(far) - 3} more" if len(far) > 3 else ""
    return [
        f"More than {OUTLIER:.0f} times as far from the base as the median tensor ({percent(middle)}): {named}{more}."
    ]


def percent(share: float) -> str:
    """A share as 12 %, 3.4 %, 0.12 %, 3.1e-05 %."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %" if value else "0"
