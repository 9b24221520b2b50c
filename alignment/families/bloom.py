"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100): ALiBi gives each head a slope of its own, so heads stay in place.

A LayerNorm writes the embeddings into the stream, and its gain cannot be folded: permutations of the stream only.
"""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, interleaved, layers, plain, reader
from alignment.families._table import Config, Table, get, need, prefix
from alignment.spaces import Spaces


def bloom(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a BLOOM network."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", True)}
    table, top = Table(config, names), prefix("transformer.", names, "h.")
    width, count = need(config, "hidden_size", "n_embed"), need(config, "n_head", "num_attention_heads")
    heads = Heads(count, 1, width // count, fixed=True)
    table.space("residual", width, "permutation")
    size = need(config, "vocab_size")
    table.space("vocabulary", size, "fixed")
    table.part("embed.weight", f"{top}word_embeddings.weight", (size, width), ("vocabulary:w", "residual:w"))
    table.norm("embed.norm", f"{top}word_embeddings_layernorm", "residual", bias=True)
    # with this switch the skip carries what the norm gives, and its gain is the stream's
    skips = get(config, "apply_residual_connection_post_layernorm", False)
    for number, layer in enumerate(layers(need(config, "n_layer", "num_hidden_layers"))):
        at = f"{top}h.{number}"
        fused, up = f"{at}.self_attention.query_key_value", f"{at}.mlp.dense_h_to_4h"
        attention(table, layer, heads, interleaved(heads, fused), f"{at}.self_attention.dense", True, True)
        plain(table, layer, 4 * width, up, f"{at}.mlp.dense_4h_to_h", "gelu")
        for norm, name, stem in (("norm1", "input_layernorm", fused), ("norm2", "post_attention_layernorm", up)):
            readers = () if skips else (reader(stem, 1, True),)
            table.norm(f"{layer}.{norm}", f"{at}.{name}", "residual", readers, bias=True)
    table.norm("norm", f"{top}ln_f", "residual", (reader("lm_head", 1, False),), bias=True, final=True)
    table.head("lm_head.weight", f"{top}word_embeddings.weight", "residual", size)
    return table.spaces()
