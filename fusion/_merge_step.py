"""The fields of a merge step, put as `merge_checkpoints` takes them; used while planning and while running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion import words
from fusion._say import nearest

OWN = ("weight", "statistics", "names")  # of a model, besides parameters that may differ per model


@dataclass(frozen=True)
class Asked:
    """What a step says about its models."""

    models: tuple[str, ...]
    weights: list[float] | None
    params: dict[str, Any]
    names: dict[str, Any]
    statistics: dict[str, Path]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "params": self.params,
            "names": self.names,
            "statistics": self.statistics,
        }


def asked(fields: Mapping[str, Any], place: str, folder: Path) -> Asked:
    """The models in order with what is said beside each; paths are relative to `folder`.

    A parameter beside a model goes for it alone, the others take the step's, or the method's default.
    """
    entries = _entries(fields, place)
    method = fields.get("method")
    word = words.find("merge", method) if method else None
    allowed = {parameter.name: parameter for parameter in word.parameters} if word else {}
    weights: dict[str, float] = {}
    own: dict[str, dict[str, Any]] = {}
    names: dict[str, Any] = {}
    statistics = {name: folder / Path(path).expanduser() for name, path in statistics_of(fields).items()}
    for model, entry in entries.items():
        at = f"{place}.models.{model}"
        for key, value in entry.items():
            if key == "weight":
                weights[model] = _number(value, f"{at}.weight")
            elif key == "names":
                names[model] = _table(value, f"{at}.names")
            elif key in allowed and "Sequence" in allowed[key].annotation:
                own.setdefault(key, {})[model] = value
            elif key in allowed:
                raise ValueError(f"{at}: {method}'s '{key}' is one for all models; give it in params")
            elif key not in OWN:
                raise ValueError(f"{at}: there is no '{key}' here{nearest(key, [*OWN, *allowed])}")
    params = dict(fields.get("params") or {})
    for key, each in own.items():
        common = params.get(key, allowed[key].default)
        if isinstance(common, list):
            raise ValueError(f"{place}.params.{key}: it is a list and stands beside a model as well; give it once")
        params[key] = [each.get(model, common) for model in entries]
    given = [weights.get(model, 1.0) for model in entries] if weights else None
    return Asked(tuple(entries), given, params, names, statistics)


def statistics_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """{model, or "base": its file of statistics}, as written."""
    found = {"base": fields["statistics"]} if fields.get("statistics") else {}
    models = fields.get("models")
    for model, entry in models.items() if isinstance(models, dict) else ():
        if isinstance(entry, dict) and "statistics" in entry:
            found[model] = str(entry["statistics"])
    return found


def _entries(fields: Mapping[str, Any], place: str) -> dict[str, dict[str, Any]]:
    """Each model with what stands beside it; of a table of layers the models in it."""
    models, layers = fields.get("models"), fields.get("layers")
    if layers is not None and models is not None:
        raise ValueError(f"{place}: layers names its models itself; leave out 'models'")
    if layers is not None:
        return {str(entry.get("model")): {} for entry in layers if isinstance(entry, dict)}
    if not models:
        raise ValueError(f"{place}: merge needs 'models'")
    if isinstance(models, list):
        for model in models:
            if models.count(model) > 1:
                raise ValueError(
                    f"{place}.models: '{model}' is given {models.count(model)} times; give it a weight instead"
                )
        return {model: {} for model in models}
    return {
        model: entry if isinstance(entry, dict) else {} if entry is None else {"weight": entry}
        for model, entry in models.items()
    }


def _table(value: Any, place: str) -> Any:
    """A table of names, its rules well formed."""
    from alignment.names import rules

    try:
        rules(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place}: a number is needed here, not {type(value).__name__} {value!r:.60}")
    return float(value)
