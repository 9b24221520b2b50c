"""Reads what the steps of a run left on disk into frozen records: the numbers behind the page and the card."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from fusion.recipe import Step

CURVE_POINTS = 500  # a longer log is averaged over equal bins, so that a page of a 100,000-step run stays small
CURVE_FIELDS = ["loss", "lm_loss", "target_loss", "target_share", "learning_rate", "grad_norm"]
CURVE_FIELDS += ["tokens_per_second", "seconds_per_step"]
CURVE_FIELDS += ["reward", "rewards/margins", "rewards/accuracies", "kl"]  # of preferences and rewards
CURVE_FIELDS += ["online_update_kept", "online_sign_conflicts", "online_drift"]
CURVE_FIELDS += ["online_update_norm", "online_task_vector_norm", "online_merged_norm"]


@dataclass(frozen=True)
class Score:
    """Bits per byte of one model on one domain, its standard error over documents, and the bytes of text in all.

    `documents` is (bits, bytes) of each document, where the metric left them: then differences get a paired error.
    """

    bits_per_byte: float
    stderr: float | None
    bytes: int | None
    documents: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Scores:
    """Everything `evaluate` steps said about one model; `other` holds every number of metrics without a picture."""

    bits_per_byte: dict[str, Score] = field(default_factory=dict)  # domain -> score
    blimp: dict[str, float] = field(default_factory=dict)  # paradigm -> accuracy in [0, 1]
    blimp_accuracy: float | None = None
    other: dict[str, float] = field(default_factory=dict)  # "metric/path/to/number" -> number


@dataclass(frozen=True)
class Store:
    """What one `record` step cost and holds."""

    name: str
    teacher: str
    numbers: dict[str, float]  # metrics.json of the step: bytes_per_token, tokens, tokens_per_second ...


@dataclass(frozen=True)
class Training:
    """One `distill` or `tune` step: where it started, on which text, its final numbers and its curve."""

    name: str
    verb: str
    start: str
    data: str
    settings: dict[str, Any]
    numbers: dict[str, float]
    curve: dict[str, list[float | None]]  # "step" and whichever of CURVE_FIELDS were logged, all of one length


@dataclass(frozen=True)
class Ran:
    """One step as it ran."""

    name: str
    verb: str
    directory: str
    key: str
    seconds: float
    started: str | None
    place: str | None
    finished: str | None
    host: str | None
    inputs: Any
    versions: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} when there is no such file."""
    return read_json(path) if path.exists() else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number: neither a bool, nor NaN, nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number in nested objects, its path joined by slashes."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{key}/")
        elif is_number(value):
            found[f"{prefix}{key}"] = value
    return found


def read_step(step: Step, directory: Path) -> Ran:
    """What step.json and done.json say; ValueError when the step isn't done or its key is missing."""
    if not (directory / "done.json").exists():
        raise ValueError(f"{directory} has no done.json: a report is written after its steps are done")
    header, done = read_json(directory / "step.json"), read_json(directory / "done.json")
    if not isinstance(header.get("key"), str):
        raise ValueError(f"{directory / 'step.json'} should hold the step's key as a string")
    if not is_number(done.get("seconds")) or done["seconds"] < 0:
        raise ValueError(f"{directory / 'done.json'} should hold seconds >= 0, it holds {done.get('seconds')!r}")
    versions = {str(name): str(version) for name, version in (header.get("versions") or {}).items()}
    return Ran(
        name=step.out,
        verb=step.verb,
        directory=directory.name,
        key=header["key"],
        seconds=float(done["seconds"]),
        started=header.get("started"),
        place=header.get("place"),
        finished=done.get("finished"),
        host=header.get("host"),
        inputs=header.get("inputs"),
        versions=versions,
    )


def read_store(step: Step, directory: Path) -> Store:
    """A record step's metrics.json."""
    numbers = numbers_of(optional_json(directory / "metrics.json"))
    return Store(step.out, str(step.fields.get("teacher", "")), numbers)


def read_training(step: Step, directory: Path) -> Training:
    """A training step's metrics.json and log.jsonl."""
    settings = {key: value for key, value in step.fields.items() if key not in ("out", "model", "data")}
    return Training(
        name=step.out,
        verb=step.verb,
        start=str(step.fields.get("model", "")),
        data=str(step.fields.get("data", "")),
        settings=settings,
        numbers=numbers_of(optional_json(directory / "metrics.json")),
        curve=read_curve(directory / "log.jsonl"),
    )


def read_curve(path: Path) -> dict[str, list[float | None]]:
    """Columns of a training log, ordered by step, at most CURVE_POINTS long; {} without a log.

    A step that a resumed run logged twice counts once, as it was logged last. A line cut off by a kill is the last one
    of its file and is left out.
    """
    if not path.exists():
        return {}
    rows: dict[float, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for count, line in enumerate(lines, start=1):
        if not line.strip() or (count == len(lines) and not line.rstrip().endswith("}")):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {count} is not JSON: {error}") from error
        if isinstance(row, dict) and is_number(row.get("step")):
            rows[row["step"]] = rows.get(row["step"], {}) | row
    ordered = [rows[step] for step in sorted(rows) if any(is_number(rows[step].get(key)) for key in CURVE_FIELDS)]
    logged = [key for key in CURVE_FIELDS if any(is_number(row.get(key)) for row in ordered)]
    size = max(1, math.ceil(len(ordered) / CURVE_POINTS))
    bins = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return {key: [mean(row.get(key) for row in rows_) for rows_ in bins] for key in ["step", *logged]} if bins else {}


def mean(values: Iterator[Any]) -> float | None:
    """Mean of the finite numbers among `values`; None when there are none."""
    finite = [value for value in values if is_number(value)]
    return sum(finite) / len(finite) if finite else None


def read_scores(steps: Sequence[tuple[Step, Path]]) -> dict[str, Scores]:
    """Model name -> everything the evaluate steps measured; ValueError where an entry is malformed.

    A domain that a later step measures again with another result is kept apart under "domain (step)".
    """
    scores: dict[str, Scores] = {}
    for step, directory in steps:
        path = directory / "metrics.json"
        models = optional_json(path).get("models")
        if models is None:
            continue
        if not isinstance(models, dict) or not all(isinstance(metrics, dict) for metrics in models.values()):
            raise ValueError(f"{path}: models should be an object of model name -> metrics")
        for model, metrics in models.items():
            known = scores.get(model, Scores())
            domains = dict(known.bits_per_byte)
            for domain, value in metrics.get("bits_per_byte", {}).items():
                score = _score(value, f"{path}: models.{model}.bits_per_byte.{domain}")
                if score is not None:
                    taken = domains.get(domain, score) != score
                    domains[f"{domain} ({step.out})" if taken else domain] = score
            accuracy, paradigms = _blimp(metrics.get("blimp", {}), f"{path}: models.{model}.blimp")
            rest = {key: value for key, value in metrics.items() if key not in ("bits_per_byte", "blimp")}
            scores[model] = Scores(
                bits_per_byte=domains,
                blimp=known.blimp | paradigms,
                blimp_accuracy=known.blimp_accuracy if accuracy is None else accuracy,
                other=known.other | numbers_of(rest),
            )
    return scores


def _score(value: Any, place: str) -> Score | None:
    """One domain's score; None where the metric itself is not finite (a text of zero bytes, say)."""
    record = value if isinstance(value, dict) else {"bits_per_byte": value}
    if not isinstance(record.get("bits_per_byte"), (int, float)):
        raise ValueError(f"{place} should hold a number bits_per_byte, it holds {value!r}")
    if not is_number(record["bits_per_byte"]):
        return None
    error, size = record.get("stderr"), record.get("bytes")
    bits, sizes = record.get("document_bits", []), record.get("document_bytes", [])
    if len(bits) != len(sizes) or not all(is_number(value) for value in [*bits, *sizes]):
        raise ValueError(f"{place}: document_bits and document_bytes should be finite numbers, one of each a document")
    return Score(
        float(record["bits_per_byte"]),
        float(error) if error and is_number(error) else None,  # one document has no error: 0.0
        int(size) if is_number(size) else None,
        tuple(zip(bits, sizes, strict=True)),
    )


def _blimp(value: Any, place: str) -> tuple[float | None, dict[str, float]]:
    """Accuracy over all pairs and per paradigm, both in [0, 1]."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} should hold accuracy and paradigms, it holds {value!r}")
    paradigms: dict[str, float] = {}
    for name, entry in value.get("paradigms", {}).items():
        accuracy = entry.get("accuracy") if isinstance(entry, dict) else entry
        if not is_number(accuracy) or not 0 <= accuracy <= 1:
            raise ValueError(f"{place}.paradigms.{name} should be an accuracy in [0, 1], it is {entry!r}")
        paradigms[name] = float(accuracy)
    overall = value.get("accuracy")
    return (float(overall) if is_number(overall) else None), paradigms
