"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219): Llama's table in fused tensors, rotary maybe partial."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config
from alignment.spaces import Spaces


def phi3(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Phi-3 network."""
    return decoder(config, names, Traits(fused=True))
