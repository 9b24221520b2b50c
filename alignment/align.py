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

from alignment._acts import Map, Plan, settle
from alignment._balance import balance, blocks_of
from alignment._descent import LINEAR, Descent, Matcher, carry
from alignment._sizes import comparable, compare, resized, scaled
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
    """Maps whose `carry` takes the donor's tensors into the target's units; every one is a symmetry of the donor where
    both networks have the same sizes and the matcher gives no coupling.

    Spaces may have other sizes in the two: where there are more target units, donor units are shared out (heads,
    couplings) or the target's own stay (`hungarian`); where there are fewer, they are means (couplings) or left out.
    Queries and keys whose head sizes or frequencies differ stay the target's; `Maps.kept` says so.

    `features` is a word, or similarities (n, n), target by donor, by the name of a space within no other: those spaces
    are matched by them, all others by weights. Heads take similarities (groups, queries in each, groups, queries) of
    their attention, in the place of how their queries and keys are written. `match` is a word or a function for spaces
    whose units change places. `vocab` says which rows of embeddings and head correspond, as row numbers (of the target,
    of the donor), or as the map from the donor's vocabulary to the target's; without it rows correspond by number.
    `layers` gives the donor's layer of each target layer. It sweeps until nothing improves. `seed` names the order of
    spaces within a sweep.
    Raises ValueError where spaces differ in group, where tensors do not fit, and where weights are not finite.
    """
    target_spaces, donor_spaces = target_spaces.of(target), donor_spaces.of(donor)
    target_spaces.check(target)
    donor_spaces.check(donor)
    if layers is not None:
        donor_spaces = donor_spaces.relabel({source: number for number, source in layers.items()})
    apart = compare(target_spaces, donor_spaces, vocab is not None, layers is not None)
    if isinstance(features, str) and features != "weights":
        raise ValueError(f"features '{features}' come from a model and its data: give the similarities by space")
    given = {} if isinstance(features, str) else features
    unknown = [name for name in given if name not in target_spaces.by_name]
    if unknown:
        raise ValueError(f"features are given for '{unknown[0]}', which is no space of the target")
    for name in given:
        space = target_spaces.by_name[name]
        if given[name].dim() == 4 and target_spaces.inner(name):
            continue
        if space.within is not None or not (
            space.group.endswith("permutation") or space.group.startswith("orthogonal")
        ):
            raise ValueError(
                f"features are given for '{name}', and spaces with its group, or within others, go by weights"
            )
    matcher = _matcher(match) if isinstance(match, str) else match

    rows = None if vocab is None else _rows(vocab)
    sides = (target_spaces, target, rows and rows[0]), (donor_spaces, donor, rows and rows[1])
    blocks = [blocks_of(*side) for side in sides]
    keys, kept = comparable(target_spaces, donor_spaces, (blocks[0], blocks[1]), apart)
    if vocab is not None:  # rows of the vocabulary are compared, and stay the target's
        moved = (part for part, _ in target_spaces.uses.get("vocabulary", ()))
        kept |= {part.key: "target and donor have other tokens" for part in moved}
    tables = (target_spaces, donor_spaces)
    even = [balance(spaces, {key: one[key] for key in keys}) for spaces, one in zip(tables, blocks)]
    balanced = [
        {key: carry(spaces, maps, spaces.by_key[key], one[key]) for key in keys}
        for spaces, maps, one in zip(tables, even, blocks)
    ]
    del blocks
    other = resized(target_spaces, donor_spaces)
    descent = Descent(target_spaces, balanced[0], balanced[1], matcher, given, other, frozenset(apart))
    descent.run(sweeps, seed)
    back, into = (
        Maps(spaces, spaces, {name: map for name, map in maps.items() if name in descent.maps})
        for spaces, maps in zip(tables, even)
    )
    maps = scaled(descent.maps, target_spaces, donor_spaces)
    found = Maps(donor_spaces, target_spaces, maps, kept).after(into)
    if other or any(isinstance(map, Plan) for map in maps.values()):
        found = _again(descent, maps).after(found)
    found = back.inverse().after(found)
    rounding = 200 * torch.finfo(next(iter(balanced[0].values())).dtype).eps
    settled = {name: settle(map, rounding) for name, map in found.maps.items()}
    return Maps(donor_spaces, target_spaces, settled, found.kept)


def _again(done: Descent, maps: Mapping[str, Map]) -> Maps:
    """The carried donor balanced again, and what is inside heads matched again: a unit that shares out its readers, or
    is written and read by a stream of another width, is balanced otherwise than the donor was."""
    table = done.spaces
    donor = {key: carry(table, maps, table.by_key[key], block) for key, block in done.donor.items()}
    even = {name: map for name, map in balance(table, donor).items() if name in maps}
    donor = {key: carry(table, even, table.by_key[key], block) for key, block in donor.items()}
    again = Descent(table, done.target, donor, done.matcher, {}, apart=done.apart)
    for space in table.spaces:
        if space.group in LINEAR and space.name in maps:
            again.update(space, everything=True)
    return Maps(table, table, again.maps).after(Maps(table, table, even))


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
