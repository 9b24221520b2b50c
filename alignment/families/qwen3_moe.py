"""Qwen3's mixtures of experts (Yang et al. 2025, arXiv:2505.09388); some layers may have one MLP instead."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config, get
from alignment.spaces import Spaces


def qwen3_moe(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Qwen3 mixture of experts."""
    bias = get(config, "attention_bias", False)
    return decoder(config, names, Traits(qkv_bias=bias, out_bias=bias, normed=True, experts="qwen"))
