"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, one tensor for q, k and v, weights stored (in, out)."""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, layers, plain, reader, stacked
from alignment.families._table import Config, Table, get, need, prefix, residual
from alignment.spaces import Spaces


def gpt2(config: Config, names: Collection[str] = ()) -> Spaces:
    """Queries and keys meet without rotation, so any invertible matrix per head; folded, the stream keeps its mean."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", True)}
    if get(config, "add_cross_attention", False):
        raise ValueError("gpt2: spaces of cross-attention are not written down")
    table, top = Table(config, names), prefix("transformer.", names, "h.")
    width, count = need(config, "n_embd", "hidden_size"), need(config, "n_head", "num_attention_heads")
    heads = Heads(count, 1, width // count)
    residual(table, width, "permutation", "orthogonal fixing ones")
    size = need(config, "vocab_size")
    table.space("vocabulary", size, "fixed")
    positions = need(config, "n_positions", "max_position_embeddings")
    table.part("embed.weight", f"{top}wte.weight", (size, width), ("vocabulary:w", "residual:w"))
    table.part("positions.weight", f"{top}wpe.weight", (positions, width), (positions, "residual:w"))
    activation, inner = get(config, "activation_function", "gelu_new"), get(config, "n_inner", 4 * width)
    for number, layer in enumerate(layers(need(config, "n_layer", "num_hidden_layers"))):
        at = f"{top}h.{number}"
        rows = stacked(heads, f"{at}.attn.c_attn")
        attention(table, layer, heads, rows, f"{at}.attn.c_proj", True, True, transposed=True)
        plain(table, layer, inner, f"{at}.mlp.c_fc", f"{at}.mlp.c_proj", activation, transposed=True)
        own = (reader(f"{at}.attn.c_attn", 0, True),)
        table.norm(f"{layer}.norm1", f"{at}.ln_1", "residual", own, bias=True)
        table.norm(f"{layer}.norm2", f"{at}.ln_2", "residual", (reader(f"{at}.mlp.c_fc", 0, True),), bias=True)
    table.norm("norm", f"{top}ln_f", "residual", (reader("lm_head", 1, False),), bias=True, final=True)
    table.head("lm_head.weight", f"{top}wte.weight", "residual", size)
    return table.spaces((".attn.bias", ".attn.masked_bias"))
