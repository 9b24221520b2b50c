"""Norm gains folded into what reads them, and taken out again: the network computes the same.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) commutes with rotations once its gain is one, LayerNorm with those
that keep the mean; this is what makes a residual stream rotate (Ashkboos et al. 2024, arXiv:2401.15024). A LayerNorm's
bias goes into its readers' biases where they have them, and else is kept, divided by the gain.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignment.families import find_family
from alignment.families._table import FOLDED
from alignment.spaces import Norm, Spaces

__all__ = ["fold", "unfold"]


def fold(
    tensors: Mapping[str, Tensor], config: Any, *, untie: bool = False, final: bool = True
) -> tuple[dict[str, Tensor], Any]:
    """The tensors with all gains that can be folded set to one, and the config that says so.

    What is folded comes back in float32 at least. A tied head reads the last norm, and its gain can be folded only into
    a head of its own: `untie` makes one, `final=False` leaves that gain where it is (and the stream its signed
    permutations). Raises ValueError for a tied head with neither, for a gain of 0 whose LayerNorm bias must be kept,
    and for a network none of whose gains can be folded.
    """
    spaces = _spaces(tensors, config)
    if not spaces.norms:
        raise ValueError(f"no gain of this {spaces.family} network can be folded: its norms write the residual stream")
    out = dict(tensors)
    tied = dict(spaces.ties)
    last = [norm for norm in spaces.norms if norm.final]
    untied: dict[str, str] = {}
    if final and last:
        untied = {name: tied[name] for name, _, _ in last[0].readers if name in tied}
        if untied and not untie:
            head, source = next(iter(untied.items()))
            raise ValueError(
                f"{head} is tied to {source}, and the gain {last[0].gain} can only be folded into a head of its own: "
                "give untie=True for one (the config then says tie_word_embeddings: false), or final=False to leave it"
            )
        out.update({head: out[source].clone() for head, source in untied.items()})
    folded = [norm.gain for norm in spaces.norms if (final or not norm.final) and _read(out, norm)]
    for norm in spaces.norms:
        if norm.gain in folded:
            _fold(out, norm)
    on_stream = [part for part in spaces.parts if [(a.space, a.role) for a in part.axes] == [("residual", "e")]]
    whole = all(part.names[0] in folded or part.names[0] not in out for part in on_stream)
    return out, _edit(config, **({FOLDED: True} if whole else {}), **({"tie_word_embeddings": False} if untied else {}))


def unfold(
    tensors: Mapping[str, Tensor], config: Any, gains: Mapping[str, Tensor], *, tie: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """The inverse of `fold`: tensors with these gains (and LayerNorm biases) by name, taken out of their readers.

    `gains` may be the tensors before folding, of this network or of the one in whose units it is. `tie` ties the head
    to the embeddings again, ValueError where they are then not the same within 1e-3 of their scale. Raises ValueError
    for a gain of 0, which cannot be taken out of anything.
    """
    spaces = _spaces(tensors, config)
    out = dict(tensors)
    for norm in spaces.norms:
        if norm.gain in gains and _read(out, norm):
            _unfold(out, norm, gains)
    if not tie:
        return out, _edit(config, **{FOLDED: False})
    spaces = _spaces(out, _edit(config, **{FOLDED: False, "tie_word_embeddings": True}), check=False)
    for alias, source in spaces.ties:
        if alias in out:
            gap = (out[alias].double() - out[source].double()).abs().max()
            if gap > 1e-3 * out[source].double().abs().max():
                raise ValueError(f"{alias} and {source} differ by up to {gap:.3g}, so they cannot be tied")
            out[alias] = out[source]
    return out, _edit(config, **{FOLDED: False, "tie_word_embeddings": True})


def _spaces(tensors: Mapping[str, Tensor], config: Any, check: bool = True) -> Spaces:
    spaces = find_family(config, frozenset(tensors))
    if check:
        spaces.check(tensors)
    return spaces


def _read(tensors: Mapping[str, Tensor], norm: Norm) -> list[tuple[str, int, str | None]]:
    """The readers of a norm that a checkpoint has; a last norm without any (a network without head) is its output."""
    return [reader for reader in norm.readers if reader[0] in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _along(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    return values.to(tensor).view([-1 if dim == axis else 1 for dim in range(tensor.dim())])


def _fold(out: dict[str, Tensor], norm: Norm) -> None:
    factor = _wide(out[norm.gain]) + norm.offset
    readers = _read(out, norm)
    if norm.bias is not None:
        shift = _wide(out[norm.bias])
        kept = any(bias is None for _, _, bias in readers)
        if kept and bool((factor == 0).any() and (shift[factor == 0] != 0).any()):
            raise ValueError(
                f"{norm.gain} is 0 where {norm.bias} is not, and {readers[0][0]} has no bias to fold it into"
            )
        if not kept:
            for name, axis, bias in readers:
                assert bias is not None
                own = _wide(out[name])
                out[bias] = _wide(out[bias]) + torch.tensordot(own, shift.to(own), ([axis], [0]))
        out[norm.bias] = shift / torch.where(factor == 0, 1, factor) if kept else torch.zeros_like(shift)
    for name, axis, _ in readers:
        own = _wide(out[name])
        out[name] = own * _along(factor, own, axis)
    out[norm.gain] = torch.full_like(_wide(out[norm.gain]), 1 - norm.offset)


def _unfold(out: dict[str, Tensor], norm: Norm, gains: Mapping[str, Tensor]) -> None:
    factor = _wide(gains[norm.gain]) + norm.offset
    if bool((factor == 0).any()):
        raise ValueError(f"{norm.gain} has a gain of 0, which cannot be taken out of its readers")
    readers = _read(out, norm)
    for name, axis, _ in readers:
        own = _wide(out[name])
        out[name] = own / _along(factor, own, axis)
    out[norm.gain] = _wide(gains[norm.gain]).clone()
    if norm.bias is None:
        return
    if any(bias is None for _, _, bias in readers):
        out[norm.bias] = _wide(out[norm.bias]) * factor
    elif norm.bias in gains:
        shift = _wide(gains[norm.bias])
        for name, axis, bias in readers:
            assert bias is not None
            own = _wide(out[name])
            out[bias] = _wide(out[bias]) - torch.tensordot(own, shift.to(own), ([axis], [0]))
        out[norm.bias] = shift.clone()


def _edit(config: Any, **fields: Any) -> Any:
    """A copy of a config, mapping or object, with these fields."""
    if isinstance(config, Mapping):
        return {**config, **fields}
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
