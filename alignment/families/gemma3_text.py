"""Gemma 3's language model (Kamath et al. 2025, arXiv:2503.19786): Gemma 2's norms, and norms on queries and keys.

Local and global layers rotate with other bases, which changes no symmetry within a layer, but which layers correspond.
"""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config, get
from alignment.spaces import Spaces


def gemma3_text(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a Gemma 3 language model."""
    bias = get(config, "attention_bias", False)
    traits = Traits(
        qkv_bias=bias, out_bias=bias, head_size=256, normed=True, post_norms=True, offset=1.0, scaled=True, tied=True
    )
    return decoder(config, names, traits)
