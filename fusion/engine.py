"""Runs a merge method over tensors in memory; `merge_checkpoints` runs it over files, streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion import words
from fusion._family import After, Family
from fusion._method import Method, weighed
from fusion._params import depths, layer_of
from fusion._say import nearest
from fusion.merge._x import joined, values


def __getattr__(name: str) -> Any:
    # from disk, lazily: they need readers and writers that tensors in memory do not
    if name not in ("blends", "merge_checkpoints"):
        raise AttributeError(f"module 'fusion.engine' has no attribute '{name}'")
    from fusion._blends import blends
    from fusion._merge import merge_checkpoints

    return {"blends": blends, "merge_checkpoints": merge_checkpoints}[name]


@torch.no_grad()
def merge_tensors(
    method: str,
    tensors: Sequence[Tensor],  # K of one shape and dtype
    *,
    base: Tensor | None = None,
    weights: Sequence[float] | None = None,  # 1 each when left out
    seed: int = 0,
    name: str = "tensor",
    inputs: Mapping[str, Sequence[Tensor | None]] | None = None,  # statistic -> one tensor for each model
    layer: tuple[int, int] | None = None,  # index and count
    step: int = 0,
    outputs: bool = False,
    **params: Any,
) -> Any:
    """The merged tensor, of the inputs' dtype; with `outputs` as Outputs, by-products included.

    `params` are the method's. Computed in float32. Raises ValueError for a method that is not there or not of one
    tensor (model scope), and for inputs that do not go together or are not finite.
    """
    found = _method(method)
    fitted = found.check(params, len(tensors), base=base is not None, weights=weighed(weights))
    if found.scope(fitted) == "model":
        raise ValueError(f"{method} looks at the whole model here (scope: model); merge_state_dicts gives it that")
    w = _weights(found, weights, len(tensors))
    family = Family(found, name, list(tensors), base, w, layer, inputs or {}, seed, step)
    merged = family.merged(found.resolve(fitted, name, layer))
    return merged if outputs else merged.tensor


@torch.no_grad()
def merge_state_dicts(
    method: str,
    dicts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | None = None,
    inputs: Mapping[str, Any] | None = None,  # statistic -> one dict for each model; a post word's -> the base's dict
    *,
    seed: int = 0,
    post: Sequence[str | Mapping[str, Any]] | None = None,  # [{"lines": {"alpha": 0.5}}]
    **params: Any,
) -> dict[str, Tensor]:
    """The merged model, in the first one's order; `post` words follow the method, one after another.

    Raises ValueError as merge_tensors does, and naming the first tensor that some have and others lack.
    """
    found, given = _method(method), inputs or {}
    fitted = found.check(params, len(dicts), base=base is not None, weights=weighed(weights))
    _same_names(dicts, base)
    after = [_post(one, base is not None) for one in post or ()]
    own = {statistic: given[statistic] for statistic in given if not isinstance(given[statistic], Mapping)}
    _sides(found, [word for word, _ in after], given, dicts)
    w, stacks = _weights(found, weights, len(dicts)), depths(dicts[0])
    families, concrete = {}, {}
    for name in dicts[0]:
        layer = layer_of(name, stacks)
        side = {statistic: [None if d is None else d.get(name) for d in own[statistic]] for statistic in own}
        below = None if base is None else base[name]
        families[name] = Family(found, name, [d[name] for d in dicts], below, w, layer, side, seed)
        concrete[name] = found.resolve(fitted, name, layer)
    stats = _model_statistics(families, concrete) if found.scope(fitted) == "model" else None
    out = {}
    for name, family in families.items():
        follows = [
            After(
                word,
                word.resolve(chosen, name, family.layer),
                {statistic: given.get(statistic, {}).get(name) for statistic in word.inputs},
            )
            for word, chosen in after
        ]
        out[name] = family.merged(concrete[name], stats, follows).tensor
    return out


def _model_statistics(families: Mapping[str, Family], params: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Tensor]:
    """All passes over all tensors; what tensors found is added in the order of their names."""
    live = [(params[name], families[name]) for name in sorted(families) if not families[name].copied]
    stats: Mapping[str, Tensor] = {}
    if not live:
        return stats
    chosen, first = live[0]
    for index in range(first.method.needed(chosen)):
        found = [family.readings(index, one, stats) for one, family in live]
        stats = first.method.settle({**stats, **values(joined(found))}, chosen, first.weights)
    return stats


def _method(word: str) -> Method:
    found = Method.of(word)
    if found.unit == "adapter":
        raise ValueError(f"{word} merges adapters, pairs of matrices; give it adapters alone, without a base")
    return found


def _weights(method: Method, given: Sequence[float] | None, k: int) -> Tensor:
    if given is None:
        return torch.ones(k)
    weights = torch.tensor([float(one) for one in given])
    if len(weights) != k:
        raise ValueError(f"{method.word}: {len(weights)} weights for {k} models; give one each")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"{method.word}: weights are {weights.tolist()}; they must be finite")
    return weights


def _post(given: str | Mapping[str, Any], base: bool) -> tuple[Method, dict[str, Any]]:
    if isinstance(given, Mapping) and len(given) == 1:
        ((word, params),) = given.items()
    else:
        word, params = words.parse("post", given, "post")
    method = Method.of(word, "post")
    if method.base_required and not base:
        raise ValueError(f"post: {word} works on what changed since a common base; give it: base")
    return method, method.check(params or {}, 1, place="post")


def _sides(
    method: Method, after: Sequence[Method], given: Mapping[str, Any], dicts: Sequence[Mapping[str, Tensor]]
) -> None:
    """Raises ValueError for statistics that nobody reads, that have the wrong form or are all of other tensors, and for
    those of the base that post words lack."""
    of_base = {statistic: word.word for word in after for statistic in word.inputs}
    for statistic, word in of_base.items():
        if not isinstance(given.get(statistic), Mapping):
            raise ValueError(
                f"post: {word} reads the statistic '{statistic}' of the base; give inputs one dict, tensor's name -> "
                f"statistic"
            )
    for statistic, one in given.items():
        if isinstance(one, Mapping) and statistic in method.inputs:
            raise ValueError(
                f"inputs['{statistic}'] is one dict, and {method.word} reads one of each model; give a list of "
                f"{len(dicts)}"
            )
        if isinstance(one, Mapping) and statistic not in of_base:
            raise ValueError(f"no post word here reads a statistic '{statistic}'{nearest(statistic, of_base)}")
        each = [one] if isinstance(one, Mapping) else one
        for i, found in enumerate(each):
            if found is not None and not isinstance(found, Mapping):
                raise ValueError(
                    f"inputs['{statistic}'] of model {i} is a {type(found).__name__}; give a dict, tensor's name -> "
                    f"statistic"
                )
        named = sorted({name for found in each if found is not None for name in found})
        if named and not any(name in dicts[0] for name in named):
            raise ValueError(
                f"inputs['{statistic}'] is about '{named[0]}', which no model has{nearest(named[0], dicts[0])}"
            )


def _same_names(dicts: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> None:
    """Raises ValueError unless all have the same tensors."""
    others = [(f"model {i}", one) for i, one in enumerate(dicts)] + ([("the base", base)] if base is not None else [])
    for whose, one in others[1:]:
        for lacking, missing in ((whose, dicts[0].keys() - one.keys()), ("model 0", one.keys() - dicts[0].keys())):
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                has = "model 0" if lacking == whose else whose
                raise ValueError(f"{lacking} lacks the tensor '{min(missing)}'{more}, which {has} has")
