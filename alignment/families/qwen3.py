"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): norms on queries and keys leave their pairs a common sign."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config, get
from alignment.spaces import Spaces


def qwen3(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Qwen3 network."""
    bias = get(config, "attention_bias", False)
    return decoder(config, names, Traits(qkv_bias=bias, out_bias=bias, head_size=128, normed=True))
