"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): LayerNorm before each block."""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, layers, plain, reader, separate
from alignment.families._table import Config, Table, get, need, pooler, prefix, residual
from alignment.spaces import Spaces


def vit(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a vision transformer, in the module's spelling or that of older files (`encoder.layer`)."""
    table, top = Table(config, names), prefix("vit.", names, "embeddings.")
    width, count = need(config, "hidden_size"), need(config, "num_attention_heads")
    heads, bias = Heads(count, 1, width // count), get(config, "qkv_bias", True)
    residual(table, width, "permutation", "orthogonal fixing ones")
    patch, channels, own = get(config, "patch_size", 16), get(config, "num_channels", 3), f"{top}embeddings"
    kernel = (channels, patch, patch)
    table.part("cls.weight", f"{own}.cls_token", (1, 1, width), (1, 1, "residual:w"))
    table.part("mask.weight", f"{own}.mask_token", (1, 1, width), (1, 1, "residual:w"), optional=True)
    table.part("positions.weight", f"{own}.position_embeddings", (1, -1, width), (1, -1, "residual:w"))
    stem = f"{own}.patch_embeddings.projection"
    table.part("embed.weight", f"{stem}.weight", (width, *kernel), ("residual:w", *kernel))
    table.part("embed.bias", f"{stem}.bias", (width,), ("residual:w",))
    old = any(".encoder.layer." in f".{name}" for name in names)
    inner, activation = need(config, "intermediate_size"), get(config, "hidden_act", "gelu")
    for number, layer in enumerate(layers(need(config, "num_hidden_layers"))):
        at = f"{top}encoder.layer.{number}" if old else f"{top}layers.{number}"
        if old:
            rows = [f"{at}.attention.attention.{name}" for name in ("query", "key", "value")]
            out, up, down = f"{at}.attention.output.dense", f"{at}.intermediate.dense", f"{at}.output.dense"
        else:
            rows = [f"{at}.attention.{name}_proj" for name in ("q", "k", "v")]
            out, up, down = f"{at}.attention.o_proj", f"{at}.mlp.fc1", f"{at}.mlp.fc2"
        attention(table, layer, heads, separate(heads, *rows), out, bias, True)
        plain(table, layer, inner, up, down, activation)
        first = tuple(reader(name, 1, bias) for name in rows)
        table.norm(f"{layer}.norm1", f"{at}.layernorm_before", "residual", first, bias=True)
        table.norm(f"{layer}.norm2", f"{at}.layernorm_after", "residual", (reader(up, 1, True),), bias=True)
    _heads(table, top, width)
    return table.spaces()


def _heads(table: Table, top: str, width: int) -> None:
    """The classifier reads the last norm, or a pooler with a tanh, which passes signs; a checkpoint has what it has."""
    tanh = get(table.config, "pooler_act", "tanh") == "tanh"
    pool = f"{top}pooler.dense"
    pooler(table, pool, ("ViTForImageClassification",), "signed permutation" if tanh else "permutation")
    table.part("classifier.weight", "classifier.weight", (-1, width), (-1, "residual:r"), optional=True)
    table.part("classifier.bias", "classifier.bias", (-1,), (-1,), optional=True)
    readers = tuple(reader(stem, 1, True) for stem in (pool, "classifier"))
    table.norm("norm", f"{top}layernorm", "residual", readers, bias=True)
