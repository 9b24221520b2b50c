"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Llama's table with experts, in the module's or the file's spelling."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config
from alignment.spaces import Spaces


def mixtral(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Mixtral network."""
    return decoder(config, names, Traits(experts="mixtral"))
