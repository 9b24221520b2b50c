"""Llama (Touvron et al. 2023, arXiv:2307.09288): RMSNorm, rotary embeddings on whole heads, grouped queries, SwiGLU."""

from collections.abc import Collection

from alignment.families._llama import Traits, decoder
from alignment.families._table import Config, get
from alignment.spaces import Spaces


def llama(config: Config, names: Collection[str] = ()) -> Spaces:
    """The residual stream turns once all gains are folded; the other spaces are those of docs/families.md."""
    bias = get(config, "attention_bias", False)
    return decoder(config, names, Traits(qkv_bias=bias, out_bias=bias, mlp_bias=get(config, "mlp_bias", False)))
