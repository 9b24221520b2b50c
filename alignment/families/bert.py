"""BERT (Devlin et al. 2018, arXiv:1810.04805): every LayerNorm writes the stream, so it takes permutations only."""

from collections.abc import Collection

from alignment.families._attention import Heads, attention, layers, plain, separate
from alignment.families._table import Config, Table, get, need, pooler, prefix
from alignment.spaces import Spaces

# classes of BERT without a pooler: what they add reads the stream itself
PLAIN = ("BertForMaskedLM", "BertLMHeadModel", "BertForTokenClassification", "BertForQuestionAnswering")


def bert(config: Config, names: Collection[str] = ()) -> Spaces:
    """The spaces of a BERT network; its heads (masked words, next sentence, classifier) where a checkpoint has them."""
    config = {**config, "tie_word_embeddings": get(config, "tie_word_embeddings", True)}
    kind = get(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"bert: spaces of position_embedding_type '{kind}' are not written down, 'absolute' is")
    table, top = Table(config, names), prefix("bert.", names, "encoder.")
    width, count = need(config, "hidden_size"), need(config, "num_attention_heads")
    heads = Heads(count, 1, width // count)
    table.space("residual", width, "permutation")
    size, activation = need(config, "vocab_size"), get(config, "hidden_act", "gelu")
    table.space("vocabulary", size, "fixed")
    own = f"{top}embeddings"
    table.part("embed.weight", f"{own}.word_embeddings.weight", (size, width), ("vocabulary:w", "residual:w"))
    for name, length in (
        ("position", need(config, "max_position_embeddings")),
        ("token_type", need(config, "type_vocab_size")),
    ):
        table.part(f"{name}.weight", f"{own}.{name}_embeddings.weight", (length, width), (length, "residual:w"))
    table.norm("embed.norm", f"{own}.LayerNorm", "residual", bias=True)
    for number, layer in enumerate(layers(need(config, "num_hidden_layers"))):
        at = f"{top}encoder.layer.{number}"
        rows = separate(heads, *(f"{at}.attention.self.{name}" for name in ("query", "key", "value")))
        attention(table, layer, heads, rows, f"{at}.attention.output.dense", True, True)
        inner = need(config, "intermediate_size")
        plain(table, layer, inner, f"{at}.intermediate.dense", f"{at}.output.dense", activation)
        table.norm(f"{layer}.norm1", f"{at}.attention.output.LayerNorm", "residual", bias=True)
        table.norm(f"{layer}.norm2", f"{at}.output.LayerNorm", "residual", bias=True)
    _heads(table, top, width, size, own)
    return table.spaces((".position_ids", ".token_type_ids"))


def _heads(table: Table, top: str, width: int, size: int, own: str) -> None:
    """A tanh passes signs; with tied embeddings the masked words' head ends in the stream's units."""
    pool = pooler(table, f"{top}pooler.dense", PLAIN, "signed permutation")
    for key, stem in (("next", "cls.seq_relationship"), ("classifier", "classifier"), ("answer", "qa_outputs")):
        table.part(f"{key}.weight", f"{stem}.weight", (-1, width), (-1, f"{pool}:r"), optional=True)
        table.part(f"{key}.bias", f"{stem}.bias", (-1,), (-1,), optional=True)
    space = "residual"
    if not table.config["tie_word_embeddings"]:
        space = table.space("transform", width, "permutation")
    stem = "cls.predictions.transform"
    axes = (f"{space}:w", "residual:r")
    table.part("transform.weight", f"{stem}.dense.weight", (width, width), axes, optional=True)
    table.part("transform.bias", f"{stem}.dense.bias", (width,), (f"{space}:w",), optional=True)
    table.norm("transform.norm", f"{stem}.LayerNorm", space, bias=True, optional=True)
    bias, decoder = "cls.predictions.bias", "cls.predictions.decoder"
    table.part("head.bias", bias, (size,), ("vocabulary:w",), optional=True)
    if space == "residual":
        table.ties.append((f"{decoder}.weight", f"{own}.word_embeddings.weight"))
        table.ties.append((f"{decoder}.bias", bias))
    else:
        table.part("head.weight", f"{decoder}.weight", (size, width), ("vocabulary:w", f"{space}:r"), optional=True)
        table.part("decoder.bias", f"{decoder}.bias", (size,), ("vocabulary:w",), optional=True)
