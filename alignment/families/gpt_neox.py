"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745): LayerNorm, a quarter of each head rotates, no tie.

Attention and MLP may run in parallel, each with a norm of its own on the same stream; the table is the same.
"""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, interleaved, layers, plain, reader
from alignment.families._table import Config, Table, get, need, residual, rotary
from alignment.spaces import Spaces


def gpt_neox(config: Config, names: Collection[str] = ()) -> Spaces:
    """Pairs of rotating coordinates turn and scale; the rest of a head's query and key takes any invertible matrix."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", False)}
    table = Table(config, names)
    width, count = need(config, "hidden_size"), need(config, "num_attention_heads")
    heads = Heads(count, 1, width // count, rotary(config, width // count, 0.25))
    bias = get(config, "attention_bias", True)
    residual(table, width, "permutation", "orthogonal fixing ones")
    size = need(config, "vocab_size")
    table.space("vocabulary", size, "fixed")
    table.part("embed.weight", "gpt_neox.embed_in.weight", (size, width), ("vocabulary:w", "residual:w"))
    activation = get(config, "hidden_act", "gelu")
    for number, layer in enumerate(layers(need(config, "num_hidden_layers"))):
        at = f"gpt_neox.layers.{number}"
        fused, up = f"{at}.attention.query_key_value", f"{at}.mlp.dense_h_to_4h"
        attention(table, layer, heads, interleaved(heads, fused), f"{at}.attention.dense", bias, bias)
        plain(table, layer, need(config, "intermediate_size"), up, f"{at}.mlp.dense_4h_to_h", activation)
        own = (reader(fused, 1, bias),)
        table.norm(f"{layer}.norm1", f"{at}.input_layernorm", "residual", own, bias=True)
        after = f"{at}.post_attention_layernorm"
        table.norm(f"{layer}.norm2", after, "residual", (reader(up, 1, True),), bias=True)
    head = "embed_out" if "embed_out.weight" in names else "lm_head"  # in a file and in the module
    last = (reader(head, 1, False),)
    table.norm("norm", "gpt_neox.final_layer_norm", "residual", last, bias=True, final=True)
    table.head(f"{head}.weight", "gpt_neox.embed_in.weight", "residual", size)
    return table.spaces((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"))
