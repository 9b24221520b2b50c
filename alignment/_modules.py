"""The rules of `alignment.trace` for modules of torch.nn: what of their own each does to the axes of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from alignment import _rules as rules
from alignment._layout import Layout, Stored, still
from alignment._units import Dim, freeze, limit

NORMS: dict[type, str] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "batch_norm"),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "instance_norm"),
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WORDS = {"LeakyReLU": "leaky_relu", "LogSoftmax": "log_softmax"}
SPATIAL = ("Pool", "Pad", "Upsample")


def module(part: nn.Module, at: str, inputs: Sequence[Any], options: Any, shape: Sequence[int], stored: Stored) -> Any:
    """The output of a module called `at`; `shape` is the output's. ValueError for one without a rule."""
    x: Layout = inputs[0]
    called = type(part).__name__

    def own(name: str) -> Layout | None:
        return stored.get(f"{at}.{name}" if at else name) if f"{at}.{name}".lstrip(".") in stored.tensors else None

    def need(name: str) -> Layout:
        found = own(name)
        assert found is not None, f"{at} has no {name}"
        return found

    if isinstance(part, nn.Linear):
        return rules.linear(x, need("weight"), own("bias"))
    if isinstance(part, (*CONVOLUTIONS, *TRANSPOSED)):
        back = isinstance(part, TRANSPOSED)
        if part.padding_mode not in ("zeros", "circular", "reflect", "replicate"):
            raise ValueError(f"no rule for padding '{part.padding_mode}'")
        return rules.convolution(x, need("weight"), own("bias"), part.groups, shape, stored, back)
    if type(part) in NORMS:
        stats = (own("running_mean"), own("running_var"))
        groups = part.num_groups if isinstance(part, nn.GroupNorm) else 1
        return rules.normalised(NORMS[type(part)], x, own("weight"), own("bias"), stats, groups)
    if isinstance(part, nn.Embedding):
        weight = need("weight")
        freeze(weight.dims[0])
        return Layout(tuple(shape), [*x.dims, weight.dims[1]])
    if isinstance(part, nn.PReLU):
        weight = need("weight")
        limit(x.dims, scales=True, signs=False)
        if weight.shape[0] > 1:
            assert weight.piece is not None
            weight.piece.hold(0, x.dims[1], "e")
        else:
            freeze(*weight.dims)
        return x.take(x.dims)
    if isinstance(part, nn.MultiheadAttention):
        return attention(part, at, inputs, options, stored), still(())
    if isinstance(part, nn.TransformerEncoderLayer):
        return encoder_layer(part, at, x, stored)
    if isinstance(part, nn.TransformerEncoder):
        for number, layer in enumerate(part.layers):
            assert isinstance(layer, nn.TransformerEncoderLayer)
            x = encoder_layer(layer, f"{at}.layers.{number}".lstrip("."), x, stored)
        last = part.norm
        return x if last is None else module(last, f"{at}.norm".lstrip("."), (x,), {}, x.shape, stored)
    if any(word in called for word in SPATIAL):
        axes = int(next((letter for letter in called if letter in "123"), len(x.shape) - 2))
        return rules.spatial(x, shape, axes, "Max" in called)
    if isinstance(part, nn.Flatten | nn.Unflatten):
        return rules.reshaped(x, shape)
    found = rules.elementwise(WORDS.get(called, called.lower()), x)
    if found is None:
        raise ValueError(f"no rule for the module {called}")
    return found


def attention(part: nn.MultiheadAttention, at: str, inputs: Sequence[Any], options: Any, stored: Stored) -> Layout:
    """Heads change places; inside each, queries and keys trade an invertible matrix, and so do values and output."""
    names = ("query", "key", "value")
    q, k, v = (inputs[n] if n < len(inputs) else options[name] for n, name in enumerate(names))
    at = f"{at}." if at else ""
    if part.bias_k is not None or part.add_zero_attn or f"{at}in_proj_weight" not in stored.tensors:
        raise ValueError("no rule for MultiheadAttention with bias_k, add_zero_attn, kdim or vdim")
    heads = stored.unit(f"{at}heads", part.num_heads, scales=False, signs=False)
    inside = {"within": heads, "group": "general linear"}
    qk, vo = (stored.unit(f"{at}{name}", part.head_dim, **inside) for name in ("qk", "vo"))
    rows: list[Dim] = [[(heads, qk)], [(heads, qk)], [(heads, vo)]]
    columns = [x.dims[-1] for x in (q, k, v)]
    roles = ["w", "r", "w"]  # keys take the inverse of what queries take
    if f"{at}in_proj_weight" in stored.pieces:
        raise ValueError("no rule for a MultiheadAttention that is called twice")
    both = [[row, column] for row, column in zip(rows, columns)]
    stored.cut(f"{at}in_proj_weight", both, [[role, "r"] for role in roles])
    if f"{at}in_proj_bias" in stored.tensors:
        stored.cut(f"{at}in_proj_bias", [[row] for row in rows], [[role] for role in roles])
    mixed = q.take([*q.dims[:-1], [(heads, vo)]])
    bias = f"{at}out_proj.bias"
    weight = stored.get(f"{at}out_proj.weight")
    return rules.linear(mixed, weight, stored.get(bias) if bias in stored.tensors else None)


def encoder_layer(part: nn.TransformerEncoderLayer, at: str, x: Layout, stored: Stored) -> Layout:
    """Attention and an MLP, each added to what went in, with a norm before or after."""

    def run(name: str, given: Layout, shape: Sequence[int] | None = None) -> Any:
        one = part.get_submodule(name)
        return module(one, f"{at}.{name}".lstrip("."), (given,), {}, shape or given.shape, stored)

    def attend(given: Layout) -> Layout:
        return attention(part.self_attn, f"{at}.self_attn".lstrip("."), (given, given, given), {}, stored)

    def feed(given: Layout) -> Layout:
        inner = run("linear1", given)
        act = part.activation
        word = act.__name__ if not isinstance(act, nn.Module) else type(act).__name__.lower()
        found = rules.elementwise(word, inner)
        if found is None:
            raise ValueError(f"no rule for the activation {word}")
        return run("linear2", found)

    sublayers: list[tuple[str, Callable[[Layout], Layout]]] = [("norm1", attend), ("norm2", feed)]
    for norm, sublayer in sublayers:
        if part.norm_first:
            x = rules.binary("add", x, sublayer(run(norm, x)), x.shape)
        else:
            x = run(norm, rules.binary("add", x, sublayer(x), x.shape))
    return x
