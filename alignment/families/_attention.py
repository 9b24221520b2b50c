"""Attention and MLP blocks, in the layouts that the families store them in."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.families._table import Sizes, Table

Take = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Heads:
    """How many heads, of what size, and what their positions leave of the symmetries within a head."""

    groups: int  # heads of keys and values
    queries: int  # query heads in a group
    size: int
    rotary: int = 0  # coordinates that rotate; 0: positions do not enter queries and keys
    fixed: bool = False  # each head has its own slope (ALiBi)
    normed: bool = False  # a norm on each query and key, before they rotate


@dataclass(frozen=True)
class Rows:
    """Where the rows of queries, keys or values lie: tensor, factors of its row axis, what to take of these."""

    stem: str
    factors: tuple[int, ...]  # the last is the head's size
    take: Take = ()


def separate(heads: Heads, q: str, k: str, v: str) -> dict[str, Rows]:
    """A tensor each, heads one after the other."""
    own = (heads.groups, heads.size)
    return {"q": Rows(q, (heads.groups, heads.queries, heads.size)), "k": Rows(k, own), "v": Rows(v, own)}


def stacked(heads: Heads, stem: str) -> dict[str, Rows]:
    """One tensor: all queries, all keys, all values (GPT-2, Phi-3)."""
    count = heads.groups * heads.queries
    factors = (count + 2 * heads.groups, heads.size)
    starts = {"q": (0, count), "k": (count, heads.groups), "v": (count + heads.groups, heads.groups)}
    return {name: Rows(stem, factors, ((0, start, length),)) for name, (start, length) in starts.items()}


def interleaved(heads: Heads, stem: str) -> dict[str, Rows]:
    """One tensor: a head's query, key and value, head after head (GPT-NeoX, BLOOM)."""
    assert heads.queries == 1
    return {
        name: Rows(stem, (heads.groups, 3, heads.size), ((1, number, 1),))
        for number, name in enumerate(("q", "k", "v"))
    }


def attention(
    table: Table,
    layer: str,
    heads: Heads,
    rows: dict[str, Rows],
    out: str,
    biases: bool,
    out_bias: bool,
    transposed: bool = False,
    norms: tuple[str, str] = ("", ""),
    offset: float = 0.0,
) -> None:
    """Spaces `kv`, `q` (query heads in a group), `qk` and `vo` (inside a head) of a layer, and their parts."""
    kv = table.space(f"{layer}.kv", heads.groups, "fixed" if heads.fixed else "permutation")
    q = table.space(f"{layer}.q", heads.queries, "permutation", kv)
    inner: list[tuple[str, int, int]] = []  # (space, first coordinate, coordinates)
    if heads.rotary:
        group = "pair signs" if heads.normed else "pair turns"
        inner.append((table.space(f"{layer}.qk", heads.rotary, group, kv), 0, heads.rotary))
    if heads.rotary < heads.size:
        rest = heads.size - heads.rotary
        name = f"{layer}.qk_rest" if heads.rotary else f"{layer}.qk"
        inner.append((table.space(name, rest, "general linear", kv), heads.rotary, rest))
    vo = table.space(f"{layer}.vo", heads.size, "general linear", kv)

    def put(what: str, space: str, role: str, first: int, count: int) -> None:
        place = rows[what]
        take = place.take
        if count < heads.size:
            take = (*take, (len(place.factors) - 1, first, count))
        axes = (f"{kv}:w", *([f"{q}:w"] if what == "q" else []), f"{space}:{role}")
        key = f"{layer}.{what}" if not first else f"{layer}.{what}_rest"
        size = table.size("residual")
        if transposed:
            shape: Sizes = (size, place.factors)
            moved = tuple((dim + 1, start, length) for dim, start, length in take)
            table.part(f"{key}.weight", f"{place.stem}.weight", shape, ("residual:r", *axes), moved)
        else:
            table.part(f"{key}.weight", f"{place.stem}.weight", (place.factors, size), (*axes, "residual:r"), take)
        if biases:
            table.part(f"{key}.bias", f"{place.stem}.bias", (place.factors,), axes, take)

    for space, first, count in inner:
        put("q", space, "w", first, count)
        put("k", space, "r", first, count)
    put("v", vo, "w", 0, heads.size)
    factors, size = (heads.groups, heads.queries, heads.size), table.size("residual")
    reading = (f"{kv}:r", f"{q}:r", f"{vo}:r")
    if transposed:
        table.part(f"{layer}.o.weight", f"{out}.weight", (factors, size), (*reading, "residual:w"))
    else:
        table.part(f"{layer}.o.weight", f"{out}.weight", (size, factors), ("residual:w", *reading))
    if out_bias:
        table.part(f"{layer}.o.bias", f"{out}.bias", (size,), ("residual:w",))
    if heads.normed:
        # the product of both gains counts: a pair's factor may move from the queries' gain to the keys'
        assert heads.rotary == heads.size
        gains = table.space(f"{layer}.qk_norm", heads.size, "pair scales")
        for name, role, stem in (("q_norm", "w", norms[0]), ("k_norm", "r", norms[1])):
            table.part(f"{layer}.{name}", f"{stem}.weight", (heads.size,), (f"{gains}:{role}",), offset=offset)


def gated(
    table: Table, layer: str, size: int, gate: str, up: str, down: str, bias: bool = False, fused: bool = False
) -> None:
    """A gated MLP, down(act(gate) * up): a neuron's up row may take any factor that its down column gives back."""
    mlp, width = table.space(f"{layer}.mlp", size, "scaled permutation"), table.size("residual")
    for number, (name, stem, role) in enumerate((("gate", gate, "e"), ("up", up, "w"))):
        rows = (2, size) if fused else (size,)
        take: Take = ((0, number, 1),) if fused else ()
        table.part(f"{layer}.{name}.weight", f"{stem}.weight", (rows, width), (f"{mlp}:{role}", "residual:r"), take)
        if bias:
            table.part(f"{layer}.{name}.bias", f"{stem}.bias", (rows,), (f"{mlp}:{role}",), take)
    table.part(f"{layer}.down.weight", f"{down}.weight", (width, size), ("residual:w", f"{mlp}:r"))
    if bias:
        table.part(f"{layer}.down.bias", f"{down}.bias", (width,), ("residual:w",))


def plain(
    table: Table,
    layer: str,
    size: int,
    up: str,
    down: str,
    activation: str,
    bias: bool = True,
    transposed: bool = False,
) -> None:
    """An MLP without gate, down(act(up)); a ReLU passes positive factors, other activations none."""
    group = "positive permutation" if activation == "relu" else "permutation"
    mlp, width = table.space(f"{layer}.mlp", size, group), table.size("residual")
    up_shape, up_axes = (size, width), (f"{mlp}:w", "residual:r")
    down_shape, down_axes = (width, size), ("residual:w", f"{mlp}:r")
    if transposed:
        up_shape, up_axes, down_shape, down_axes = up_shape[::-1], up_axes[::-1], down_shape[::-1], down_axes[::-1]
    table.part(f"{layer}.up.weight", f"{up}.weight", up_shape, up_axes)
    table.part(f"{layer}.down.weight", f"{down}.weight", down_shape, down_axes)
    if bias:
        table.part(f"{layer}.up.bias", f"{up}.bias", (size,), (f"{mlp}:w",))
        table.part(f"{layer}.down.bias", f"{down}.bias", (width,), ("residual:w",))


def layers(count: int) -> list[str]:
    """The names of layers, the same in all families."""
    return [f"layers.{number}" for number in range(count)]


Reader = tuple[str, int, str | None]


def reader(stem: str, axis: int, bias: bool) -> Reader:
    """A reader of a norm: its weight, the stored axis on which it reads, its bias."""
    return f"{stem}.weight", axis, f"{stem}.bias" if bias else None
