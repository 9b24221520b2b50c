"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama's table; the sliding window changes no symmetry."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config
from alignment.spaces import Spaces


def mistral(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Mistral network."""
    return decoder(config, names, Traits())
