"""Coordinate descent over the spaces of two balanced networks; `alignment.align` says what it is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignment._acts import Index, Map, Matrix, Plan, Turn, act, coupled
from alignment._balance import pairs, unfold
from alignment._heads import assign_heads, expert_similarity, form_similarity
from alignment._sizes import inside_queries
from alignment.features.weights import scale, weights
from alignment.match.hungarian import hungarian
from alignment.match.procrustes import procrustes
from alignment.spaces import Part, Space, Spaces

LINEAR = ("general linear", "pair turns", "pair signs")  # groups inside a head
PIECE = 1 << 20
TIE = 1e-6  # of a similarity that is given: less than any difference that means something
Matcher = Callable[..., Tensor]  # (n, m) similarities, and those within each network where it names them
Rows = tuple[Tensor, Tensor]  # of target and donor


def carry(spaces: Spaces, maps: Mapping[str, Map], part: Part, block: Tensor, but: int = -1) -> Tensor:
    """A block of a part, carried along all its axes but one; its offset is in the block already."""
    for number in spaces.order(part):
        name = part.axes[number].space
        if name is not None and name in maps and number != but:
            block = act(maps[name], part.axes[number].role, block, number, spaces.within_axis(part, number))
    return block


@dataclass
class Descent:
    """Balanced blocks of both networks by key, and the maps found so far: all of them keep norms."""

    spaces: Spaces
    target: Mapping[str, Tensor]
    donor: Mapping[str, Tensor]
    matcher: Matcher
    given: Mapping[str, Tensor]
    resized: frozenset[str] = frozenset()  # spaces with other sizes in target and donor
    apart: Collection[str] = ()  # spaces that do not correspond
    maps: dict[str, Map] = field(default_factory=dict)
    scaled: bool = False  # whether blocks are in proportion as they are: no part is divided by its root mean squares

    def run(self, sweeps: int, seed: int) -> None:
        """Sweeps until the weighted inner product of target and carried donor no longer grows."""
        generator = torch.Generator().manual_seed(seed)
        best, kept = -float("inf"), dict(self.maps)
        double = any(block.dtype == torch.float64 for block in self.target.values())
        gain = 1e-12 if double else 1e-6  # less is rounding
        for sweep in range(max(1, sweeps)):
            outer = [space for space in self.spaces.spaces if space.within is None]
            if sweep:
                outer = [outer[number] for number in torch.randperm(len(outer), generator=generator).tolist()]
            for space in outer:
                self.visit(space, everything=sweep > 0)
            total = self.total()
            if sweep and total <= best + gain * abs(best):
                break
            best, kept = total, dict(self.maps)
        self.maps = kept

    def visit(self, space: Space, everything: bool) -> None:
        """The best map of a space, then those of the spaces within it."""
        self.update(space, everything)
        for inner in self.spaces.inner(space.name):
            if inner.name not in self.maps or inner.group != "permutation" or not self.heads(space):
                self.update(inner, everything)

    def heads(self, space: Space) -> list[Space]:
        """The linear spaces inside the units of a space, if these are heads."""
        return [inner for inner in self.spaces.inner(space.name) if inner.group in LINEAR]

    def update(self, space: Space, everything: bool) -> None:
        """The best map of one space, all others as they are; none where no evidence is left."""
        inner = self.spaces.inner(space.name)
        if inner and (space.name not in self.given or self.given[space.name].dim() == 4):
            if self.heads(space):
                self._update_heads(space)
            elif space.group != "fixed":
                self._update_experts(space)
            return
        if space.group == "fixed" or space.name in self.apart:
            return
        evidence: dict[str, list[Rows]] = {"linear": [], "e": []}
        for part, number in self.spaces.uses[space.name]:
            if part.key in self.target and self._known(part, number, everything):
                role = "e" if part.axes[number].role == "e" else "linear"
                evidence[role].append(self._pair(part, number))
        if not evidence["linear"] and not evidence["e"] and space.name not in self.given:
            return
        map = self._match(space, evidence["linear"], evidence["e"])
        if map is not None:
            self.maps[space.name] = map

    def _match(self, space: Space, linear: list[Rows], gains: list[Rows]) -> Map | None:
        group, copied = space.group, space.within is not None
        if group.startswith("pair"):
            if not linear:
                return None
            dot = torch.zeros(1, dtype=torch.complex128)
            for one, other in linear:
                a, b = pairs(one), pairs(other)
                dot = dot + (a * b.conj()).sum(-1).cpu() * (1.0 if self.scaled else scale(a, b))
            turn = torch.sgn(dot) if group == "pair turns" else torch.sgn(dot.real).to(torch.complex128)
            turn = torch.where(turn == 0, 1, turn)
            return Turn(turn if copied else turn[0])
        if space.name in self.given:
            signed = self.given[space.name].clone()[None]
            if linear and "permutation" in group:  # what others cannot tell apart, dead units, goes by weights
                table = weights(linear, self.scaled).cpu().to(signed)
                signed += TIE * table / table.abs().max().clamp_min(torch.finfo(table.dtype).tiny)
            linear, gains = [], []
        else:
            first, second = (linear or gains)[0]
            shape = len(first), first.shape[1], second.shape[1]
            signed = weights(linear, self.scaled).cpu() if linear else torch.zeros(shape)
        if group in ("orthogonal", "orthogonal fixing ones", "general linear"):
            q = procrustes(signed if copied else signed[0], fixing_ones=group == "orthogonal fixing ones")
            return Matrix(q, q.mT)
        signs = group in ("signed permutation", "scaled permutation")
        own = signed.sign().to(torch.int8) if signs else None
        # tables of units by units are the largest that there are, so they are changed in place
        table = signed.abs_() if signs else signed
        if gains:
            table += weights(gains, self.scaled).cpu()
        made = torch.stack([self._call(number, one, linear, gains, signs) for number, one in enumerate(table)])
        if made.is_floating_point():
            if self.spaces.inner(space.name):
                raise ValueError(
                    f"space '{space.name}': what is within its units is matched unit by unit, and this matcher gives a "
                    "coupling"
                )
            plan = coupled(made, own)
            return plan if copied else Plan(plan.write[0], plan.read[0], plan.even[0])
        found = None
        if own is not None:
            found = own.gather(2, made.clamp_min(0)[..., None])[..., 0].double()
            found = torch.where(found == 0, 1, found)
        return Index(made if copied else made[0], found if found is None or copied else found[0])

    def _call(self, number: int, table: Tensor, linear: list[Rows], gains: list[Rows], signs: bool) -> Tensor:
        """The matcher's answer, for copy `number` of a space."""
        if not {"target", "donor"} <= set(inspect.signature(self.matcher).parameters):
            return self.matcher(table)
        if not linear and not gains:
            raise ValueError("a matcher by relations within each network needs units described by their weights")

        def within(rows: list[Rows], n: int) -> Tensor:
            size = len(table) if n == 0 else table.shape[1]
            return (
                weights([(pair[n][number][None],) * 2 for pair in rows])[0].cpu() if rows else torch.zeros(size, size)
            )

        found = []
        for n in (0, 1):
            first = within(linear, n)
            found.append((first.abs() if signs else first) + within(gains, n))
        return self.matcher(table, target=found[0], donor=found[1])

    def _update_heads(self, space: Space) -> None:
        """The order of heads, and of query heads in each, by the functions of heads."""
        within = {space.name, *(inner.name for inner in self.spaces.inner(space.name))}
        total = self.given.get(space.name)
        for inner in self.heads(space):
            if space.name in self.given and inside_queries(inner.name):
                continue
            rows: dict[str, list[Rows]] = {"w": [], "r": []}
            for part, number in self.spaces.uses[inner.name]:
                if part.key in self.target and self._known(part, number, False, within):
                    rows[part.axes[number].role].append(self._heads_pair(part, number, space.name, within))
            if rows["w"] and rows["r"]:
                form = form_similarity(rows["w"], rows["r"], inner.group.startswith("pair"))
                total = form if total is None else total + form.expand_as(total)
        if total is None:
            return
        queries = [inner for inner in self.spaces.inner(space.name) if inner.group not in LINEAR]
        outer, inside = assign_heads(total.cpu(), space.group == "fixed")
        if space.group != "fixed":
            self.maps[space.name] = Index(outer)
        for inner in queries:
            if inner.group != "fixed":
                self.maps[inner.name] = Index(inside)

    def _heads_pair(self, part: Part, number: int, heads: str, within: set[str]) -> Rows:
        """(heads, queries or 1, n, F) rows of a part, of target and of donor carried outside the heads."""
        names = [axis.space for axis in part.axes]
        first = names.index(heads)
        others = [n for n, name in enumerate(names) if name in within and n not in (first, number)]
        made = []
        for block in (self.target[part.key], self._carried(part, self.donor[part.key], within)):
            front = block.movedim((first, *others, number), tuple(range(2 + len(others))))
            front = front if others else front.unsqueeze(1)
            made.append(front.flatten(3) if front.dim() > 3 else front[..., None])
        return made[0], made[1]

    def _update_experts(self, space: Space) -> None:
        """The order of experts, by their router rows and by what they read and write."""
        within = {space.name, *(inner.name for inner in self.spaces.inner(space.name))}
        plain, inside = [], []
        for part, number in self.spaces.uses[space.name]:
            if part.key not in self.target or not self._known(part, number, False, within):
                continue
            both = self.target[part.key], self._carried(part, self.donor[part.key], within)
            inner = [n for n, axis in enumerate(part.axes) if axis.space in within and n != number]
            if inner:
                one, other = (
                    block.movedim((number, inner[0]), (0, 1)).flatten(1).unflatten(1, (block.shape[inner[0]], -1))
                    for block in both
                )
                inside.append((one, other))
            else:
                one, other = (block.movedim(number, 0).flatten(1) for block in both)
                plain.append((one, other))
        if plain or inside:
            self.maps[space.name] = Index(hungarian(expert_similarity(plain, inside)))

    def _known(self, part: Part, number: int, everything: bool, but: Collection[str] = ()) -> bool:
        """Whether the part tells of its axis `number`: all its other spaces are matched, or nothing of them moves."""
        names = [axis.space for n, axis in enumerate(part.axes) if n != number and axis.space is not None]
        if any(name in self.resized and name not in self.maps and name not in but for name in names):
            return False
        return everything or all(
            name in self.maps or name in but or self.spaces.by_name[name].group == "fixed" for name in names
        )

    def _pair(self, part: Part, number: int) -> Rows:
        """(copies, n, F) rows of one axis of a part, the donor's carried along all the others."""
        block = self._carried(part, self.donor[part.key], set(), number)
        return unfold(self.spaces, part, number, self.target[part.key]), unfold(self.spaces, part, number, block)

    def _carried(self, part: Part, block: Tensor, but: set[str], axis: int = -1) -> Tensor:
        maps = {name: map for name, map in self.maps.items() if name not in but}
        return carry(self.spaces, maps, part, block, axis)

    def total(self) -> float:
        """The inner product of target and carried donor, each part over its tensors' root mean squares."""
        found = 0.0
        for key, one in self.target.items():
            if any(axis.space in self.resized and axis.space not in self.maps for axis in self.spaces.by_key[key].axes):
                continue
            other = self._carried(self.spaces.by_key[key], self.donor[key], set())
            # in pieces, so that float32 sums stay short; no map but a coupling changes a donor's norm
            pieces = zip(one.flatten().split(PIECE), other.flatten().split(PIECE))
            found += sum(float(a @ b) for a, b in pieces) * (1.0 if self.scaled else scale(one, other))
        return found
