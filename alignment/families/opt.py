"""OPT (Zhang et al. 2022, arXiv:2205.01068): LayerNorm before or (350m) after, ReLU, learned positions from 2 on.

Where embeddings are narrower than the stream (350m), they have a space of their own, which takes any invertible matrix:
with a tied head both projections read it.
"""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, layers, plain, reader, separate
from alignment.families._table import FOLDED, Config, Table, get, need, prefix, residual
from alignment.spaces import Spaces


def opt(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of an OPT network."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", True)}
    table, top = Table(config, names), prefix("model.", names, "decoder.") + "decoder."
    width, count = need(config, "hidden_size"), need(config, "num_attention_heads")
    heads = Heads(count, 1, width // count)
    bias, before = get(config, "enable_bias", True), get(config, "do_layer_norm_before", True)
    affine = get(config, "layer_norm_elementwise_affine", True)
    if not affine and before:
        table.config = {**config, FOLDED: True}  # there is no gain to fold
    residual(table, width, "permutation", "orthogonal fixing ones" if before else "permutation")
    reading = _ends(table, top, width)
    positions = need(config, "max_position_embeddings") + 2
    table.part("positions.weight", f"{top}embed_positions.weight", (positions, width), (positions, "residual:w"))
    activation = get(config, "activation_function", "relu")
    for number, layer in enumerate(layers(need(config, "num_hidden_layers"))):
        at = f"{top}layers.{number}"
        own = [f"{at}.self_attn.{name}_proj" for name in ("q", "k", "v")]
        attention(table, layer, heads, separate(heads, *own), f"{at}.self_attn.out_proj", bias, bias)
        plain(table, layer, need(config, "ffn_dim"), f"{at}.fc1", f"{at}.fc2", activation, bias)
        if affine:
            first = tuple(reader(name, 1, bias) for name in own) if before else ()
            second = (reader(f"{at}.fc1", 1, bias),) if before else ()
            table.norm(f"{layer}.norm1", f"{at}.self_attn_layer_norm", "residual", first, bias=True)
            table.norm(f"{layer}.norm2", f"{at}.final_layer_norm", "residual", second, bias=True)
    if affine and before and not get(config, "_remove_final_layer_norm", False):
        last = (reader(reading, 1, False),)
        table.norm("norm", f"{top}final_layer_norm", "residual", last, bias=True, final=reading == "lm_head")
    return table.spaces()


def _ends(table: Table, top: str, width: int) -> str:
    """Embeddings and head with their spaces; what reads the stream at its end."""
    size = need(table.config, "vocab_size")
    narrow = get(table.config, "word_embed_proj_dim", width)
    table.space("vocabulary", size, "fixed")
    embed = f"{top}embed_tokens.weight"
    if narrow == width:
        table.part("embed.weight", embed, (size, width), ("vocabulary:w", "residual:w"))
        table.head("lm_head.weight", embed, "residual", size)
        return "lm_head"
    table.space("embedding", narrow, "general linear")
    table.part("embed.weight", embed, (size, narrow), ("vocabulary:w", "embedding:w"))
    table.part("project_in.weight", f"{top}project_in.weight", (width, narrow), ("residual:w", "embedding:r"))
    # a tied head contracts the embeddings with what project_out gives, which therefore reads them
    last, role = ("embedding", "r") if table.config["tie_word_embeddings"] else ("unembedding", "w")
    if last == "unembedding":
        table.space(last, narrow, "general linear")
    table.part("project_out.weight", f"{top}project_out.weight", (narrow, width), (f"{last}:{role}", "residual:r"))
    table.head("lm_head.weight", embed, last, size)
    return f"{top}project_out"
