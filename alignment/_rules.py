"""What each operation of a network does to the units on its axes: the rules of `alignment.trace`, by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment._layout import Layout, Stored, still
from alignment._units import Dim, Unit, freeze, join, limit, narrow, regroup, resolve

POSITIVE = {"relu", "leaky_relu", "rrelu"}
ODD = {"tanh", "sin", "atan", "erf", "asinh", "softsign", "hardshrink", "softshrink"}
PLAIN = {"gelu", "silu", "sigmoid", "elu", "selu", "celu", "mish", "softplus", "hardswish", "hardsigmoid", "hardtanh"}
PLAIN |= {"relu6", "exp", "log", "sqrt", "rsqrt", "abs", "square", "pow", "clamp", "logsigmoid", "log_softmax", "cos"}
PLAIN |= {"softmax", "softmin", "softmax2d", "reciprocal", "log1p", "threshold", "tanhshrink"}
SAME = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "identity", "contiguous"}
SAME |= {"to", "float", "double", "detach", "clone", "neg", "type", "type_as", "positive", "cpu"}
SHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"}
BINARY = {"add", "sub", "mul", "truediv", "div", "rsub"}


def elementwise(name: str, x: Layout) -> Layout | None:
    """An operation on each number apart, or a softmax; None where `name` is none."""
    if name in SAME:
        return x.take(x.dims)
    if name not in POSITIVE | ODD | PLAIN:
        return None
    limit(x.dims, scales=name in POSITIVE, signs=name in ODD)
    return x.take(x.dims)


def binary(name: str, one: Any, other: Any, shape: Sequence[int]) -> Layout:
    """Sum, difference, product or quotient of two tensors, or of a tensor and a number."""
    tensors = [x for x in (one, other) if isinstance(x, Layout)]
    product = name in ("mul", "truediv", "div")
    if len(tensors) == 1:
        if not product or (tensors[0] is other and name != "mul"):
            limit(tensors[0].dims)  # a number added to all units, or divided by them
        return tensors[0].take(tensors[0].dims)
    out: list[Dim] = []
    for number in range(-len(shape), 0):
        both = [x for x in tensors if -number <= len(x.shape) and x.shape[number] > 1]
        if len(both) == 2:
            out.append(join(both[0].dims[number], both[1].dims[number]))
        elif both:
            if not product:
                limit([both[0].dims[number]])
            out.append(both[0].dims[number])
        else:
            out.append([(shape[number],)])
    stored = [x for x in tensors if x.piece is not None]
    if product:
        for x in stored:
            assert x.piece is not None
            for dim in range(len(x.shape)):
                x.piece.role(dim, "e")
        if len(stored) != 1 or (name != "mul" and tensors[0] is stored[0]):
            limit(out)
    return Layout(tuple(shape), out)


def linear(x: Layout, weight: Layout, bias: Layout | None) -> Layout:
    """x W^T + b; W (out, in) reads the last axis of x."""
    assert weight.piece is not None
    weight.piece.hold(1, x.dims[-1], "r")
    weight.piece.role(0, "w")
    return x.take([*x.dims[:-1], _biased(weight.dims[0], bias)], (*x.shape[:-1], weight.shape[0]))


def _biased(dim: Dim, bias: Layout | None) -> Dim:
    if bias is not None:
        assert bias.piece is not None
        bias.piece.hold(0, dim, "w")
    return dim


def convolution(
    x: Layout, weight: Layout, bias: Layout | None, groups: int, shape: Sequence[int], stored: Stored, back: bool
) -> Layout:
    """A convolution, or its transpose (`back`), over the last axes; groups change places whole with what they read."""
    assert weight.piece is not None
    spatial = len(weight.shape) - 2
    freeze(*weight.dims[2:], *x.dims[len(x.dims) - spatial :])
    channels = x.dims[-spatial - 1]
    out: Dim
    if groups == 1:
        reads, writes = (0, 1) if back else (1, 0)
        weight.piece.hold(reads, channels, "r")
        weight.piece.role(writes, "w")
        out = weight.dims[writes]
    elif back:
        raise ValueError("a transposed convolution with groups has no rule")
    else:
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        name = weight.piece.name.removesuffix(".weight")
        outer = stored.unit(f"{name}.groups", groups, scales=inputs == 1, signs=inputs == 1)
        within = {"within": outer}
        inner = stored.unit(f"{name}.inputs", inputs, **within), stored.unit(f"{name}.outputs", outputs, **within)
        out = [(outer, inner[1])]
        join(channels, [(outer, inner[0])])
        if inputs > 1 or outputs > 1:
            limit([channels, out])  # scales within groups are left alone
        weight.piece.hold(0, out, "e" if inputs == outputs == 1 else "w")
        weight.piece.hold(1, [(inner[0],)], "r")
    dims = [*x.dims[: -spatial - 1], _biased(out, bias), *still(shape[-spatial:]).dims]
    return Layout(tuple(shape), dims)


def normalised(
    name: str, x: Layout, gain: Layout | None, bias: Layout | None, stats: Sequence[Layout | None], groups: int = 1
) -> Layout:
    """A normalisation with its gain and bias; `stats` are stored mean and variance."""
    count = len(gain.shape) if gain is not None else 1
    at = list(range(len(x.dims) - count, len(x.dims))) if name in ("layer_norm", "rms_norm") else [1]
    limit(x.dims, signs=name in ("batch_norm", "instance_norm", "rms_norm"))
    channels = x.shape[at[0]]
    if name == "group_norm" and 1 < groups < channels:
        dim = x.dims[1]
        outer = Unit("", groups, (1 << 60,), scales=False, signs=False)
        inner = Unit("", channels // groups, (1 << 60, 1), outer, scales=False, signs=False)
        join(dim, [(outer, inner)])
    roles = [(gain, "e"), (bias, "w"), *zip(stats, ("w", "e"))]
    for tensor, role in roles:
        if tensor is not None:
            assert tensor.piece is not None
            for number, place in enumerate(at):
                tensor.piece.hold(number, x.dims[place], role)
    return x.take(x.dims)


def spatial(x: Layout, shape: Sequence[int], axes: int, positive: bool) -> Layout:
    """Pooling, padding or resizing of the last axes."""
    freeze(*x.dims[len(x.dims) - axes :])
    if positive:
        limit(x.dims, scales=True, signs=False)
    return Layout(tuple(shape), [*x.dims[:-axes], *still(shape[-axes:]).dims])


def reduced(name: str, x: Layout, axes: Sequence[int], keep: bool, shape: Sequence[int]) -> Layout:
    """A mean, a sum or an extreme over axes; what it is over must keep its scale and sign."""
    places = {axis % len(x.shape) for axis in axes}
    limit(x.dims[place] for place in places)
    if name not in ("mean", "sum"):
        limit(x.dims, scales=name in ("amax", "amin", "max", "min"), signs=False)
    dims: list[Dim] = [[()] if n in places else dim for n, dim in enumerate(x.dims) if keep or n not in places]
    return Layout(tuple(shape), dims)


def moved(name: str, x: Layout, args: Sequence[Any], shape: Sequence[int]) -> Layout:
    """Axes in another order."""
    order = list(range(len(x.shape)))
    if name in ("t", "T", "mT"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "permute":
        order = list(args[0]) if isinstance(args[0], Sequence) else list(args)
    elif name in ("transpose", "swapaxes", "swapdims"):
        order[args[0]], order[args[1]] = order[args[1]], order[args[0]]
    else:
        taken = [args[0]] if isinstance(args[0], int) else list(args[0])
        places = [args[1]] if isinstance(args[1], int) else list(args[1])
        taken, places = [axis % len(order) for axis in taken], [axis % len(order) for axis in places]
        rest = [axis for axis in order if axis not in taken]
        for place, axis in sorted(zip(places, taken)):
            rest.insert(place, axis)
        order = rest
    return Layout(tuple(shape), [x.dims[axis] for axis in order])


def joined(tensors: Sequence[Layout], axis: int, shape: Sequence[int]) -> Layout:
    """Tensors one after the other on an axis, their other axes the same."""
    axis %= len(shape)
    dims: list[Dim] = []
    for number in range(len(shape)):
        own = [x.dims[number] for x in tensors]
        if number == axis:
            dims.append([segment for dim in own for segment in resolve(dim)])
        else:
            for dim in own[1:]:
                join(own[0], dim)
            dims.append(own[0])
    return Layout(tuple(shape), dims)


def pieces(x: Layout, axis: int, shapes: Sequence[Sequence[int]]) -> tuple[Layout, ...]:
    """A tensor cut on an axis."""
    axis, at, out = axis % len(x.shape), 0, []
    for shape in shapes:
        dims = list(x.dims)
        dims[axis] = narrow(x.dims[axis], at, shape[axis])
        at += shape[axis]
        out.append(Layout(tuple(shape), dims))
    return tuple(out)


def indexed(x: Layout, index: Any, shape: Sequence[int]) -> Layout:
    """Entries by numbers, slices, None and an ellipsis; by tensors only where nothing moves."""
    given = index if isinstance(index, tuple) else (index,)
    real = sum(one is not None and one is not Ellipsis for one in given)
    full = [more for one in given for more in ([slice(None)] * (len(x.shape) - real) if one is Ellipsis else [one])]
    full += [slice(None)] * (len(x.shape) - sum(one is not None for one in full))
    dims: list[Dim] = []
    at = 0
    for one in full:
        if one is None:
            dims.append([()])
            continue
        dim, count, at = x.dims[at], x.shape[at], at + 1
        if isinstance(one, int):
            freeze(dim)
        elif isinstance(one, slice) and one.step in (None, 1):
            start, stop, _ = one.indices(count)
            dims.append(dim if stop - start == count else narrow(dim, start, stop - start))
        else:
            freeze(*x.dims)
            return still(shape)
    return Layout(tuple(shape), dims)


def product(one: Layout, other: Layout, shape: Sequence[int]) -> Layout:
    """A matrix product of two computed tensors: what is summed over is the same in both."""
    limit([*one.dims, *other.dims])
    lead: list[Dim] = []
    for number in range(-len(shape), -2):
        both = [x.dims[number] for x in (one, other) if -number <= len(x.shape) and x.shape[number] > 1]
        lead.append(join(*both) if len(both) == 2 else both[0] if both else [(shape[number],)])
    join(one.dims[-1], other.dims[-2])
    return Layout(tuple(shape), [*lead, one.dims[-2], other.dims[-1]])


def reshaped(x: Layout, shape: Sequence[int]) -> Layout:
    """The same numbers in the same order, in another shape."""
    return Layout(tuple(shape), regroup(x.dims, x.shape, shape))


def expanded(x: Layout, shape: Sequence[int]) -> Layout:
    """Axes of length 1 repeated."""
    lead = len(shape) - len(x.shape)
    dims: list[Dim] = [
        x.dims[number - lead] if number >= lead and x.shape[number - lead] == count else [(count,)]
        for number, count in enumerate(shape)
    ]
    return Layout(tuple(shape), dims)


def attended(query: Layout, key: Layout, value: Layout, shape: Sequence[int]) -> Layout:
    """Scaled dot product attention over the last two axes; heads before them go together."""
    limit([*query.dims, *key.dims, *value.dims])
    freeze(key.dims[-2], value.dims[-2])
    for number in range(-len(shape), -2):
        join(join(query.dims[number], key.dims[number]), value.dims[number])
    join(query.dims[-1], key.dims[-1])
    return query.take([*query.dims[:-1], value.dims[-1]], shape)
