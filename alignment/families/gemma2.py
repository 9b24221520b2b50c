"""Gemma 2 (Riviere et al. 2024, arXiv:2408.00118): gains 1 + w, also on what attention and MLP write; tied embeddings,
which the stream takes times the root of its width.

The gains on what is written cannot be folded, so the residual stream never rotates: signed permutations only.
"""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config, get
from alignment.spaces import Spaces


def gemma2(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Gemma 2 network."""
    bias = get(config, "attention_bias", False)
    traits = Traits(qkv_bias=bias, out_bias=bias, head_size=256, post_norms=True, offset=1.0, scaled=True, tied=True)
    return decoder(config, names, traits)
