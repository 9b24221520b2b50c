"""Which unit of a donor is which of a target, for all spaces of two networks at once.

Coordinate descent as in weight matching (Ainsworth et al. 2022, arXiv:2209.04836): each space in turn takes the map
under which the donor's parts, carried by all other maps, are nearest the target's. Besides permutations there are
rotations (orthogonal Procrustes), signs, phases of rotary pairs, and, by balancing both networks first, scales and
invertible matrices. The first sweep uses for each space only parts whose other spaces are known; heads and experts are
told apart by what does not depend on the units inside them, so the start is no guess.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from alignment._acts import settle
from alignment._balance import balance
from alignment._descent import Descent, Matcher, carry
from alignment.maps import Maps
from alignment.spaces import Spaces
from alignment.vocab import VocabMap

__all__ = ["align"]


def align(
    target: Mapping[str, Tensor],
    donor: Mapping[str, Tensor],
    target_spaces: Spaces,
    donor_spaces: Spaces,
    *,
    features: str | Mapping[str, Tensor] = "weights",
    match: str | Matcher = "hungarian",
    vocab: VocabMap | tuple[Tensor, Tensor] | None = None,
    layers: Mapping[int, int] | None = None,
    sweeps: int = 5,
    seed: int = 0,
) -> Maps:
    """Maps whose `carry` takes the donor's tensors into the target's units; every one is a symmetry of the donor.

    `features` is a word, or similarities (n, n), target by donor, by the name of a space within no other: those spaces
    are matched by them, all others by weights. `match` is a word or a function for spaces whose units change places.
    `vocab` says which rows of embeddings and head correspond, as row numbers (of the target, of the donor), or as the
    map from the donor's vocabulary to the target's; without it rows correspond by number. `layers` gives the donor's
    layer of each target layer. It sweeps until nothing improves. `seed` names the order of spaces within a sweep.
    Raises ValueError where spaces differ in size or group, where tensors do not fit, and where weights are not finite.
    """
    target_spaces, donor_spaces = target_spaces.of(target), donor_spaces.of(donor)
    target_spaces.check(target)
    donor_spaces.check(donor)
    if layers is not None:
        donor_spaces = donor_spaces.relabel({source: number for number, source in layers.items()})
    _same(target_spaces, donor_spaces, vocab is not None, layers is not None)
    if isinstance(features, str) and features != "weights":
        raise ValueError(f"features '{features}' come from a model and its data: give the similarities by space")
    given = {} if isinstance(features, str) else features
    unknown = [name for name in given if name not in target_spaces.by_name]
    if unknown:
        raise ValueError(f"features are given for '{unknown[0]}', which is no space of the target")
    for name in given:
        space = target_spaces.by_name[name]
        if space.within is not None or not (
            space.group.endswith("permutation") or space.group.startswith("orthogonal")
        ):
            raise ValueError(
                f"features are given for '{name}', and spaces with its group, or within others, go by weights"
            )
    matcher = _matcher(match) if isinstance(match, str) else match

    rows = None if vocab is None else _rows(vocab)
    blocks = [_blocks(target_spaces, target, rows and rows[0]), _blocks(donor_spaces, donor, rows and rows[1])]
    keys = [key for key in blocks[0] if key in blocks[1] and blocks[0][key].shape == blocks[1][key].shape]
    tables = (target_spaces, donor_spaces)
    even = [balance(spaces, {key: one[key] for key in keys}) for spaces, one in zip(tables, blocks)]
    balanced = [
        {key: carry(spaces, maps, spaces.by_key[key], one[key]) for key in keys}
        for spaces, maps, one in zip(tables, even, blocks)
    ]
    del blocks
    descent = Descent(target_spaces, balanced[0], balanced[1], matcher, given)
    descent.run(sweeps, seed)
    back, into = (
        Maps(spaces, spaces, {name: map for name, map in maps.items() if name in descent.maps})
        for spaces, maps in zip(tables, even)
    )
    found = back.inverse().after(Maps(donor_spaces, target_spaces, descent.maps)).after(into)
    rounding = 200 * torch.finfo(next(iter(balanced[0].values())).dtype).eps
    return Maps(donor_spaces, target_spaces, {name: settle(map, rounding) for name, map in found.maps.items()})


def _blocks(spaces: Spaces, tensors: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
    """All parts that a checkpoint has, in one precision, offsets added; rows of the vocabulary as they correspond."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
    found = {}
    for part in spaces.parts:
        if all(name in tensors for name in part.names):
            block = part.read(tensors).to(dtype) + part.offset
            names = [axis.space for axis in part.axes]
            if rows is not None and "vocabulary" in names:
                block = block.index_select(names.index("vocabulary"), rows)
            if not bool(torch.isfinite(block.sum(dtype=torch.float64))):
                raise ValueError(f"{part.names[0]} holds nan or infinity")
            found[part.key] = block
    return found


def _same(target: Spaces, donor: Spaces, vocab: bool, layers: bool) -> None:
    """ValueError where the two tables have other spaces, sizes or groups."""
    for space in target.spaces:
        if space.name == "vocabulary" and vocab:
            continue
        if space.name not in donor.by_name:
            if layers and space.name.startswith("layers."):
                continue
            raise ValueError(
                f"the target has a space '{space.name}', and the donor, a {donor.family} network, has none"
            )
        other = donor.by_name[space.name]
        if (space.size, space.group) != (other.size, other.group):
            raise ValueError(
                f"space '{space.name}' is {space.size} units with the group '{space.group}' in the target, and "
                f"{other.size} with '{other.group}' in the donor"
            )
    for space in donor.spaces:
        if space.name not in target.by_name and not (layers and space.name.startswith("unmatched.")):
            raise ValueError(
                f"the donor has a space '{space.name}', and the target, a {target.family} network, has none"
            )


def _rows(vocab: VocabMap | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of target and donor that stand for the same token; of a map those whose bucket has one token of each."""
    if not isinstance(vocab, VocabMap):
        return vocab
    counts = [torch.bincount(index[index >= 0], minlength=vocab.size) for index in (vocab.student_index, vocab.index)]
    alone = (counts[0] == 1) & (counts[1] == 1)
    found = []
    for index in (vocab.student_index, vocab.index):
        ids = torch.nonzero((index >= 0) & alone[index.clamp_min(0)])[:, 0]
        found.append(ids[index[ids].argsort()])
    return found[0], found[1]


def _matcher(word: str) -> Matcher:
    folder = Path(__file__).parent / "match"
    known = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    if word not in known:
        near = get_close_matches(word, known, 1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown match word '{word}' in {', '.join(known)}{guess}")
    function: Matcher = vars(importlib.import_module(f"alignment.match.{word}"))[word]
    return function
