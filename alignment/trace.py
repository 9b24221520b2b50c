"""The unit spaces of any torch module that torch.fx can follow, derived from one run and put to the test.

Each operation says which axes of its inputs, outputs and weights hold the same units (as in PLeaS, Nasery et al. 2024,
arXiv:2407.02447, and there by union-find too); `alignment.verify` draws random elements of all groups and decides
whether the table is right. Inputs and outputs keep their order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from alignment import _rules as rules
from alignment._layout import Layout, Stored, still
from alignment._modules import module as module_rule
from alignment._units import freeze
from alignment.spaces import Spaces
from alignment.verify import verify

__all__ = ["outputs_of", "trace"]

ALIKE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "subtract": "sub", "multiply": "mul"}
ALIKE |= {"divide": "div", "moveaxis": "movedim"}
PASSED = ("num_batches_tracked",)
POOLS = {"max_pool": True, "avg_pool": False, "interpolate": False, "pad": False}


def trace(module: nn.Module, example: Any) -> Spaces:
    """The spaces of a module, each with the group that its operations are known to pass.

    `example` is an input: a tensor, a tuple of positional arguments or a mapping of keyword arguments; two samples are
    better than one, since an axis of length 1 tells nothing. It is run in float64 and evaluation mode. Raises
    ValueError with the operation that has no rule, where the module's Python cannot be followed, and where random
    elements of the derived groups move the outputs.
    """
    own = copy.deepcopy(module).cpu().double().eval()
    args, kwargs = _arguments(example)
    try:
        graph = fx.Tracer().trace(own)
    except (TypeError, ValueError, RuntimeError, AttributeError, fx.proxy.TraceError) as error:  # a user's own code
        raise ValueError(
            f"torch.fx cannot follow {type(module).__name__}: {str(error).splitlines()[0]}. Its forward must not "
            "branch on what it computes; a family file (alignment/families) says the same by hand"
        ) from error
    stored = Stored(dict(_state(own)))
    placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
    run = _Run(fx.GraphModule(own, graph), stored)
    with torch.no_grad():
        run.run(*args, *(kwargs[str(name)] for name in placeholders[len(args) :] if str(name) in kwargs))
    spaces = stored.spaces(type(module).__name__, PASSED)
    verify(outputs_of(own, example), _disturbed(stored.tensors), spaces, tolerance=1e-9)
    return spaces


def outputs_of(module: nn.Module, example: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from a network's tensors to its outputs for an example, as one flat tensor."""
    args, kwargs = _arguments(example)

    def outputs(tensors: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            made = torch.func.functional_call(module, dict(tensors), args, kwargs, tie_weights=False)
        leaves = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        return torch.cat([leaf.flatten().double() for leaf in leaves])

    return outputs


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def raised(leaf: Any) -> Any:
        return leaf.detach().cpu().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    example = pytree.tree_map(raised, example)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All that a state dict holds, tied tensors under each of their names."""
    kept = set(module.state_dict())
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if name in kept]


def _disturbed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other tensors of the same shapes: gains that are all one, and zeros, would hide a wrong map."""
    generator = torch.Generator().manual_seed(0)
    first: dict[int, str] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        origin = first.setdefault(id(tensor), name)  # tied tensors stay tied
        if origin != name or not tensor.is_floating_point():
            made[name] = made.get(origin, tensor)
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
        moved = tensor.detach() + 0.2 * (spread + 0.1) * noise
        made[name] = moved.abs() + 0.1 if name.endswith("running_var") else moved
    return made


class _Run(fx.Interpreter):
    """One run of the network, with the units on the axes of every tensor beside it."""

    def __init__(self, graph: fx.GraphModule, stored: Stored) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.stored = stored
        self.layouts: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.layouts[n] = self._layout(n, out)
        return out

    def _layout(self, node: fx.Node, out: Any) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda one: self.layouts[one])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda one: self.layouts[one])
        if node.op == "placeholder":
            return pytree.tree_map(lambda leaf: still(leaf.shape) if isinstance(leaf, Tensor) else leaf, out)
        if node.op == "output":
            pytree.tree_map(lambda leaf: freeze(*leaf.dims) if isinstance(leaf, Layout) else None, args)
            return None
        if node.op == "get_attr":
            name = str(node.target)
            return self.stored.get(name) if name in self.stored.tensors else still(out.shape)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            return out  # sizes, and what is computed from them
        shape = tuple(out.shape) if isinstance(out, Tensor) else ()
        try:
            if node.op == "call_module":
                part = self.module.get_submodule(str(node.target))
                return module_rule(part, str(node.target), args, kwargs, shape, self.stored)
            return self._call(_word(node), list(args), dict(kwargs), out, shape)
        except ValueError as error:
            raise ValueError(
                f"alignment.trace cannot follow '{node.name}' ({node.target}): {error}; a family file "
                "(alignment/families) says the same by hand"
            ) from error

    def _call(self, word: str, args: list[Any], kwargs: dict[str, Any], out: Any, shape: tuple[int, ...]) -> Any:
        if word in rules.BINARY:
            return rules.binary(word, args[0], args[1] if len(args) > 1 else kwargs["other"], shape)
        if word in ("getitem", "getattr") and not isinstance(args[0], Layout):
            return args[0][args[1]]
        if word in ("cat", "concat", "stack"):
            tensors, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if word == "stack":
                axis %= len(shape)
                tensors = [rules.reshaped(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in tensors]
            return rules.joined(tensors, axis, shape)
        given = [x for x in [*args, *kwargs.values()] if isinstance(x, Layout)]
        if not given:
            return still(shape)  # made from sizes alone
        x = args[0] if args and isinstance(args[0], Layout) else given[0]
        found = rules.elementwise(word, x)
        if found is not None:
            return found
        if word in rules.SHAPES:
            return rules.reshaped(x, shape)
        if word in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "t"):
            order = args[1:] or list(kwargs.values())
            return rules.moved(word, x, order, shape)
        if word in ("getattr", "T", "mT"):
            return rules.moved(args[1] if word == "getattr" else word, x, (), shape)
        if word in ("expand", "expand_as", "broadcast_to"):
            return rules.expanded(x, shape)
        if word in ("mean", "sum", "amax", "amin"):
            axes = args[1] if len(args) > 1 else kwargs.get("dim", list(range(len(x.shape))))
            axes = [axes] if isinstance(axes, int) else axes
            keep = bool(kwargs.get("keepdim", len(args) > 2 and args[2]))
            return rules.reduced(word, x, axes, keep, shape)
        if word in ("chunk", "split"):
            axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            return rules.pieces(x, axis, [tuple(one.shape) for one in out])
        if word == "getitem":
            return rules.indexed(x, args[1], shape)
        if word in ("matmul", "bmm") and all(one.piece is None for one in given):
            return rules.product(args[0], args[1], shape)
        if word == "scaled_dot_product_attention":
            return rules.attended(given[0], given[1], given[2], shape)
        if word == "linear":
            return rules.linear(x, args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        if word in ("layer_norm", "rms_norm"):
            values = [*args[2:], *(kwargs.get(name) for name in ("weight", "bias")[max(0, len(args) - 2) :])]
            return rules.normalised(word, x, values[0], values[1] if word == "layer_norm" else None, ())
        pool = next((positive for name, positive in POOLS.items() if name in word), None)
        if pool is not None:
            return rules.spatial(x, shape, _moving(x.shape, shape), pool)
        raise ValueError(f"no rule for '{word}'")


def _moving(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """How many last axes an operation works on: those after the first two, where these stay as they are."""
    if before[:2] != after[:2]:
        raise ValueError("only the axes after the first two may change their length")
    return len(before) - 2


def _word(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else target.__name__
    plain = name.strip("_") if name.startswith("__") else name.rstrip("_")
    return ALIKE.get(plain, plain)
