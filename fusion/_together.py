"""Networks of one architecture opened together, for the steps that make one of them on data: zip, least_squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion._blocks import Flow, module_of, token_batches

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.spaces import Spaces
    from fusion.checkpoint import Source
    from fusion.job import Job


@dataclass(frozen=True)
class Together:
    """The networks in the first one's units, names and dtypes."""

    names: tuple[str, ...]
    source: Source  # of the first
    spaces: Spaces  # in the spelling of its file
    tensors: tuple[dict[str, Tensor], ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def units(self) -> list[str]:
        """The spaces of layers whose units change places alone: neurons of an MLP, not heads or experts."""
        from alignment.zip import zippable

        return [name for name in zippable(self.spaces) if name.startswith("layers.")]


def opened(job: Job, models: Sequence[str], maps: Sequence[str] = ()) -> Together:
    """The models as they are stored, outputs of align steps (`maps`) in the place of their donors.

    Raises ValueError where they differ in architecture, sizes or tokens.
    """
    from alignment import Maps, find_family
    from fusion._align import _other_tokens
    from fusion._whole import read_whole

    names = standing_in(job, models, maps)
    sources = [job.source(name) for name in names]
    tables = [find_family(one.config, frozenset(one.entries)) for one in sources]
    tensors = []
    for name, source, table in zip(names, sources, tables):
        same_sizes(tables[0], table, names[0], name, job.place)
        _other_tokens(job, sources[0], source, names[0], name, False)
        own = read_whole(source)
        if own.keys() != sources[0].entries.keys():  # another spelling
            own = Maps(table, tables[0], {}).carry(own)
        tensors.append({key: own[key].to(entry.dtype) for key, entry in sources[0].entries.items()})
    return Together(tuple(names), sources[0], tables[0], tuple(tensors))


def standing_in(job: Job, models: Sequence[str], maps: Sequence[str]) -> list[str]:
    """The models with the outputs of align steps in the place of their donors."""
    fields = {step.out: step.fields for step in job.recipe.steps}
    instead = {fields[name]["donor"]: name for name in maps}
    return [instead.get(name, name) for name in models]


def same_sizes(first: Spaces, other: Spaces, name: str, other_name: str, place: str) -> None:
    """ValueError where two networks differ in a space: its size or its group, or that only one has it; and where only
    the other has a head of its own."""
    if first.ties and not other.ties:
        raise ValueError(
            f"{place}.models: {other_name} has a head of its own, and that of {name} is tied; name {other_name} first, "
            f"or give {name} one: align: {{out: ..., target: {name}, donor: {name}, untie: true}}"
        )
    for space in (*first.spaces, *other.spaces):
        own, theirs = first.by_name.get(space.name), other.by_name.get(space.name)
        if own != theirs:
            sizes = ", ".join(f"{'none' if one is None else one.size}" for one in (own, theirs))
            raise ValueError(
                f"{place}.models: {name} and {other_name} are networks of other sizes: '{space.name}' has {sizes} "
                f"units; write {other_name} in the sizes of {name} first: align: {{out: ..., target: {name}, donor: "
                f"{other_name}}}"
            )


def flows(
    job: Job, networks: Together, data: str, tokens: int, length: int
) -> tuple[list[dict[str, Tensor]], list[Flow]]:
    """The batches, and each network on them."""
    batches = token_batches(job, networks.names, data, tokens, length)
    return batches, [flow(job, networks.config, one, batches) for one in networks.tensors]


def flow(job: Job, config: dict[str, Any], tensors: dict[str, Tensor], batches: list[dict[str, Tensor]]) -> Flow:
    """One network on batches."""
    module = module_of(config, tensors, job.device)
    return Flow(module, module_spaces(config, module), batches)


def module_spaces(config: dict[str, Any], module: Any) -> Spaces:
    """A network's table in the spelling of its module."""
    from alignment import find_family

    return find_family(config, frozenset(module.state_dict()))


def reader_of(flow: Flow, name: str) -> str:
    """The module whose input is a space's units."""
    return next(
        part.names[0].removesuffix(".weight")
        for part, number in flow.spaces.uses[name]
        if part.axes[number].role == "r" and part.names[0].endswith(".weight")
    )
