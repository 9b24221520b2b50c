"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama's table with biases on queries, keys and values."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config
from alignment.spaces import Spaces


def qwen2(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Qwen2 network."""
    return decoder(config, names, Traits(qkv_bias=True))
