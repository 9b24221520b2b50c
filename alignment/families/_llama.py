"""Decoders laid out like Llama: pre-norm RMSNorm, rotary embeddings, grouped queries, a gated MLP or experts."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from alignment.families._attention import Heads, Reader, attention, gated, layers, reader, separate, stacked
from alignment.families._moe import experts
from alignment.families._table import Config, Table, get, need, residual, rotary
from alignment.spaces import Spaces


@dataclass(frozen=True)
class Traits:
    """What tells these families from one another."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_size: int | None = None  # where the config's class has one that does not follow from the width
    normed: bool = False  # norms on queries and keys
    post_norms: bool = False  # norms on what attention and MLP write
    offset: float = 0.0  # added to every gain
    scaled: bool = False  # embeddings times the root of the width; a tied head reads them as they are
    fused: bool = False  # one tensor for q, k and v, one for gate and up
    tied: bool = False  # what the config's class takes where it says nothing
    experts: str | None = None  # the spelling of experts in files


def decoder(config: Config, names: Collection[str], traits: Traits) -> Spaces:
    """The spaces of such a decoder."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", traits.tied)}
    table = Table(config, names)
    width, count = need(config, "hidden_size"), need(config, "num_attention_heads")
    groups = get(config, "num_key_value_heads", count)
    size = get(config, "head_dim", traits.head_size or width // count)
    heads = Heads(groups, count // groups, size, rotary(config, size), normed=traits.normed)
    # a gain on what a layer writes stays: the residual stream then never rotates
    grown = "signed permutation" if traits.post_norms else "orthogonal"
    residual(table, width, "signed permutation", grown)
    vocabulary = table.space("vocabulary", need(config, "vocab_size"), "fixed")
    embed = "model.embed_tokens.weight"
    shape, factor = (table.size(vocabulary), width), math.sqrt(width) if traits.scaled else 1.0
    table.part("embed.weight", embed, shape, ("vocabulary:w", "residual:w"), factor=factor)
    for number, layer in enumerate(layers(need(config, "num_hidden_layers"))):
        at = f"model.layers.{number}"
        _layer(table, layer, at, heads, traits)
        mlp = _mlp(table, layer, at, number, traits)
        read = ("qkv_proj",) if traits.fused else ("q_proj", "k_proj", "v_proj")
        own = tuple(reader(f"{at}.self_attn.{name}", 1, traits.qkv_bias) for name in read)
        table.norm(f"{layer}.norm1", f"{at}.input_layernorm", "residual", own, offset=traits.offset)
        if traits.post_norms:
            table.norm(f"{layer}.post1", f"{at}.post_attention_layernorm", "residual", offset=traits.offset)
            table.norm(f"{layer}.norm2", f"{at}.pre_feedforward_layernorm", "residual", mlp, offset=traits.offset)
            table.norm(f"{layer}.post2", f"{at}.post_feedforward_layernorm", "residual", offset=traits.offset)
        else:
            table.norm(f"{layer}.norm2", f"{at}.post_attention_layernorm", "residual", mlp, offset=traits.offset)
    last = (reader("lm_head", 1, False),)
    table.norm("norm", "model.norm", "residual", last, offset=traits.offset, final=True)
    table.head("lm_head.weight", embed, "residual", table.size(vocabulary))
    return table.spaces((".rotary_emb.inv_freq",))


def _layer(table: Table, layer: str, at: str, heads: Heads, traits: Traits) -> None:
    own = f"{at}.self_attn"
    rows = (
        stacked(heads, f"{own}.qkv_proj")
        if traits.fused
        else separate(heads, f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
    )
    norms = (f"{own}.q_norm", f"{own}.k_norm")
    out = f"{own}.o_proj"
    attention(table, layer, heads, rows, out, traits.qkv_bias, traits.out_bias, norms=norms, offset=traits.offset)


def _mlp(table: Table, layer: str, at: str, number: int, traits: Traits) -> tuple[Reader, ...]:
    """The MLP's spaces and parts; which tensors read its norm."""
    config = table.config
    if traits.experts is not None:
        sparse = get(config, "decoder_sparse_step", 1)
        if number not in get(config, "mlp_only_layers", []) and (number + 1) % sparse == 0:
            return experts(table, layer, at, traits.experts)
    own, size = f"{at}.mlp", need(config, "intermediate_size")
    if traits.fused:
        stem = f"{own}.gate_up_proj"
        gated(table, layer, size, stem, stem, f"{own}.down_proj", traits.mlp_bias, fused=True)
        return (reader(stem, 1, traits.mlp_bias),)
    gate, up = f"{own}.gate_proj", f"{own}.up_proj"
    gated(table, layer, size, gate, up, f"{own}.down_proj", traits.mlp_bias)
    return reader(gate, 1, traits.mlp_bias), reader(up, 1, traits.mlp_bias)
